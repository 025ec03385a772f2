// Python's view of the engine. Arrays become pointers; whoever waits holds no GIL and can be interrupted.

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/unique_ptr.h>
#include <nanobind/stl/vector.h>

#include <chrono>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "crc32.h"
#include "engine.h"

namespace nb = nanobind;

namespace flashrt::io {
namespace {

using Bytes = nb::ndarray<uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Rows = nb::ndarray<uint8_t, nb::ndim<2>, nb::device::cpu>;
using Integers = nb::ndarray<const int64_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

constexpr std::chrono::milliseconds SLICE{50};  // after which a waiting thread looks for Ctrl-C

// Calls `over`, which waits for one slice, until it says so.
template <typename F>
void patiently(F over) {
    for (;;) {
        {
            nb::gil_scoped_release release;
            if (over()) return;
        }
        if (PyErr_CheckSignals() != 0) throw nb::python_error();
    }
}

std::unique_ptr<Backend> make_backend(const std::string& name, unsigned depth) {
    if (!name.empty() && name != "io_uring" && name != "pread") throw std::runtime_error("there is no backend " + name);
    std::string why_not = "it was not asked for";
    std::unique_ptr<Backend> ring = name == "pread" ? nullptr : make_uring(depth, why_not);
    if (ring) return ring;
    if (name == "io_uring") throw std::runtime_error("this system has no io_uring: " + why_not);
    return make_pool(depth);
}

// The engine and the memory that it works in.
struct Owner {
    Owner(const std::string& backend, unsigned depth, size_t chunk, Bytes staging)
        : memory(staging), engine(make_backend(backend, depth), chunk, staging.data(), staging.size()) {}

    Bytes memory;
    Engine engine;
};

// A request: keeps its memory and its engine alive for as long as the system may write to it.
class Read {
   public:
    Read(std::shared_ptr<Owner> owner, Request* request, nb::object memory)
        : owner_(std::move(owner)), memory_(std::move(memory)), request_(request) {
        if (!request_) throw std::runtime_error("the engine is closed");
    }
    Read(const Read&) = delete;
    Read& operator=(const Read&) = delete;
    ~Read() {
        if (!request_) return;
        nb::gil_scoped_release release;
        owner_->engine.release(request_);
    }

    bool ready() const { return request_->over.load(std::memory_order_acquire); }
    void cancel() { owner_->engine.cancel(request_); }
    uint64_t at() const { return request_->at; }
    uint64_t bytes_read() const { return request_->bytes_read.load(std::memory_order_relaxed); }

    int wait() {
        if (!ready()) patiently([this] { return owner_->engine.wait(request_, SLICE); });
        return request_->status;
    }

   private:
    std::shared_ptr<Owner> owner_;
    nb::object memory_;
    Request* request_;
};

std::unique_ptr<Read> start_read(std::shared_ptr<Owner> owner, int file, bool direct, uint64_t offset, nb::object buffer,
                                 std::optional<uint32_t> crc, int cached) {
    const auto to = nb::cast<Bytes>(buffer, false);
    Request* request = owner->engine.read({file, direct, cached}, offset, to.data(), to.size(), crc);
    return std::make_unique<Read>(std::move(owner), request, std::move(buffer));
}

std::unique_ptr<Read> start_rows(std::shared_ptr<Owner> owner, int file, bool direct, Integers offsets, nb::object rows,
                                Integers slots) {
    const auto out = nb::cast<Rows>(rows, false);
    if (offsets.size() != slots.size()) throw std::invalid_argument("there must be one slot for each offset");
    if (out.size() > 0 && out.shape(1) > 1 && out.stride(1) != 1) throw std::invalid_argument("a row must be contiguous");
    for (size_t i = 0; i < slots.size(); ++i) {
        if (slots(i) < 0 || static_cast<size_t>(slots(i)) >= out.shape(0)) throw std::out_of_range("no such slot");
        if (offsets(i) < 0) throw std::out_of_range("an offset is negative");
    }
    Request* request = owner->engine.read_rows({file, direct}, offsets.data(), slots.data(), offsets.size(),
                                               out.shape(1), out.data(), out.stride(0));
    return std::make_unique<Read>(std::move(owner), request, std::move(rows));
}

}  // namespace
}  // namespace flashrt::io

NB_MODULE(_io, m) {
    using namespace nb::literals;
    using namespace flashrt::io;

    m.attr("ENDED") = static_cast<int>(ENDED);
    m.attr("DAMAGED") = static_cast<int>(DAMAGED);
    m.attr("CANCELLED") = static_cast<int>(CANCELLED);

    m.def("crc32", [](nb::ndarray<const uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu> data, bool portable) {
        return (portable ? crc32_portable : crc32)(data.data(), data.size());
    }, "data"_a, "portable"_a = false);

    m.def("spans", [](Integers offsets, uint64_t bytes, std::vector<double> costs) {
        Merger merger;
        merger.set_costs(std::move(costs));
        std::vector<Row> rows;
        for (size_t i = 0; i < offsets.size(); ++i) rows.push_back({static_cast<uint64_t>(offsets(i)), bytes, nullptr});
        std::vector<Merger::Run> runs;
        std::vector<MergedRead> reads;
        merger.cut(rows, runs, reads);
        nb::list result;
        for (const MergedRead& read : reads) result.append(nb::make_tuple(read.first, read.last));
        return result;
    }, "offsets"_a, "row_bytes"_a, "costs"_a);

    nb::class_<Read>(m, "Read")
        .def_prop_ro("ready", &Read::ready)
        .def_prop_ro("at", &Read::at)
        .def_prop_ro("bytes_read", &Read::bytes_read)
        .def("wait", &Read::wait)
        .def("cancel", &Read::cancel);

    nb::class_<Owner>(m, "Engine")
        .def(nb::init<const std::string&, unsigned, size_t, Bytes>(), "backend"_a, "depth"_a, "chunk"_a, "staging"_a)
        .def_prop_ro("backend", [](const Owner& o) { return o.engine.backend(); })
        .def_prop_ro("bytes_read", [](const Owner& o) { return o.engine.bytes_read(); })
        .def_prop_ro("max_span_pages", [](const Owner& o) { return o.engine.max_span_pages(); })
        .def("set_costs", [](Owner& o, std::vector<double> costs) { o.engine.set_costs(std::move(costs)); }, "costs"_a)
        .def("read", &start_read, "file"_a, "direct"_a, "offset"_a, "buffer"_a, "crc"_a = nb::none(),
             "cached"_a = -1)
        .def("read_rows", &start_rows, "file"_a, "direct"_a, "offsets"_a, "out"_a, "slots"_a)
        .def("settle", [](Owner& o) { patiently([&] { return o.engine.settle(SLICE); }); })
        .def("close", [](Owner& o) {
            nb::gil_scoped_release release;
            o.engine.close();
        });
}
