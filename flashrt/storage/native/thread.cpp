#include "thread.h"

#include <signal.h>

#include <system_error>
#include <utility>

#include "backend.h"

namespace flashrt::io {

void Thread::start(const char* name, std::function<void()> body) {
    body_ = std::move(body);
    pthread_attr_t attributes;
    pthread_attr_init(&attributes);
    pthread_attr_setstacksize(&attributes, STACK_BYTES);
    sigset_t all, before;  // a new thread inherits the mask: signals are left to the interpreter's own threads
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    const auto run = [](void* self) -> void* {
        static_cast<Thread*>(self)->body_();
        return nullptr;
    };
    const int error = pthread_create(&thread_, &attributes, run, this);
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
    pthread_attr_destroy(&attributes);
    if (error != 0) throw std::system_error(error, std::generic_category(), "a thread for reads cannot be started");
    running_ = true;
#if defined(__linux__)
    pthread_setname_np(thread_, name);
#else
    (void)name;
#endif
}

void Thread::join() {
    if (running_) pthread_join(thread_, nullptr);
    running_ = false;
}

}  // namespace flashrt::io
