// What Python passes, checked: every error is a ValueError that begins with the argument's name.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <string>
#include <type_traits>

#include "ops.h"

namespace flashrt {

namespace nb = nanobind;

[[noreturn]] inline void wrong(const char* name, const std::string& what) {
    throw nb::value_error((std::string(name) + ": " + what).c_str());
}

inline std::string text(const int64_t* numbers, int n) {
    std::string result = "(";
    for (int i = 0; i < n; ++i) result += (i ? ", " : "") + std::to_string(numbers[i]);
    return result + ")";
}

// An array of the caller's, which the caller keeps alive. Steps are in elements. A const T may be read-only.
template <typename T>
struct Array {
    static constexpr int MOST = 5;
    const char* name;
    T* data = nullptr;
    int dims = 0;
    int64_t shape[MOST] = {}, step[MOST] = {};

    Array(const char* name, nb::handle object, int dims) : name(name), dims(dims) {
        using Found = std::conditional_t<std::is_const_v<T>, nb::ndarray<nb::ro, nb::device::cpu>,
                                         nb::ndarray<nb::device::cpu>>;
        Found found;
        if (!nb::try_cast(object, found, false)) refuse(object);
        if (found.dtype() != nb::dtype<std::remove_const_t<T>>())
            wrong(name, std::string("expected ") + type_name() + ", found " + dtype_of(object));
        const int have = static_cast<int>(found.ndim());
        if (have != dims)
            wrong(name, "expected " + std::to_string(dims) + " dimensions, found " + std::to_string(have));
        bool empty = false;
        for (int i = 0; i < dims; ++i) {
            shape[i] = static_cast<int64_t>(found.shape(i));
            step[i] = found.stride(i);
            empty = empty || shape[i] == 0;
            if (step[i] < 0) wrong(name, "strides " + text(step, i + 1) + " are negative");
        }
        if (!empty) contiguous(1);
        data = static_cast<T*>(const_cast<std::conditional_t<std::is_const_v<T>, const void*, void*>>(found.data()));
    }

    // The last `n` dimensions lie back to back.
    void contiguous(int n) const {
        int64_t next = 1;
        for (int i = dims - 1; i >= dims - n; next *= shape[i--])
            if (shape[i] > 1 && step[i] != next)
                wrong(name, "the last " + std::to_string(n) + " dimensions are not contiguous (strides " +
                                text(step, dims) + " in elements)");
    }

    void expect(int dimension, int64_t length) const {
        if (shape[dimension] != length)
            wrong(name, "expected length " + std::to_string(length) + " in dimension " + std::to_string(dimension) +
                            ", found shape " + text(shape, dims));
    }

    int64_t size() const {
        int64_t n = 1;
        for (int i = 0; i < dims; ++i) n *= shape[i];
        return n;
    }

   private:
    static const char* type_name() {
        using Plain = std::remove_const_t<T>;
        return std::is_same_v<Plain, float> ? "float32" : std::is_same_v<Plain, uint8_t> ? "uint8" : "int32";
    }
    static std::string dtype_of(nb::handle object) {
        const nb::object dtype = object.attr("dtype");
        return nb::str(nb::handle(dtype)).c_str();
    }
    [[noreturn]] void refuse(nb::handle object) const {
        nb::ndarray<nb::ro, nb::device::cpu> readable;
        if (!std::is_const_v<T> && nb::try_cast(object, readable, false)) wrong(name, "read-only");
        const nb::object type = object.type().attr("__name__");
        wrong(name, std::string("expected a numpy array, found ") + nb::str(nb::handle(type)).c_str());
    }
};

// A vector of `length`, or null for None.
template <typename T>
const T* vector_or_null(const char* name, nb::handle object, int64_t length) {
    if (object.is_none()) return nullptr;
    const Array<const T> v(name, object, 1);
    v.expect(0, length);
    return v.data;
}

inline int shared(const char* name, int64_t heads, int64_t kv_heads) {
    if (kv_heads == 0 || heads % kv_heads)
        wrong(name, std::to_string(heads) + " query heads cannot share " + std::to_string(kv_heads) + " KV heads");
    return static_cast<int>(kv_heads);
}

struct Queries {  // [tokens, heads, dim]
    const float* data;
    size_t step;
    int tokens, heads, dim;

    explicit Queries(nb::handle object) {
        const Array<const float> q("q", object, 3);
        q.contiguous(2);
        if (q.shape[2] < 1 || q.shape[2] > WIDEST_HEAD)
            wrong("q", "heads of 1 to " + std::to_string(WIDEST_HEAD) + " are supported, found " +
                           std::to_string(q.shape[2]));
        data = q.data;
        step = static_cast<size_t>(q.step[0]);
        tokens = static_cast<int>(q.shape[0]);
        heads = static_cast<int>(q.shape[1]);
        dim = static_cast<int>(q.shape[2]);
    }
};

// How `bytes` hold keys and values of `dim` numbers.
inline KvCodecs kv_codecs(const char* name, int64_t bytes, int64_t dim) {
    constexpr KvCodecs known[] = {{Codec::Q8_0, Codec::Q8_0}, {Codec::Q8_0, Codec::Q4_0}, {Codec::Q8_0, Codec::Q8_0, true}};
    for (const KvCodecs codecs : known) {
        if (bytes == static_cast<int64_t>(kv_pair_bytes(codecs, static_cast<int>(dim)))) return codecs;
    }
    wrong(name, std::to_string(bytes) + " bytes hold no keys and values of heads of " + std::to_string(dim));
}

// Keys and values of heads of `dim` numbers: [.., 2, dim] of float32 or uint16 (bfloat16 bits), or [.., 1, n] of uint8.
// Where values are the first numbers of keys: [.., 1, dim], or [.., 1, n] of uint8.
struct Cache {
    const char* name;
    void* data = nullptr;
    KvCodecs codecs{};
    int64_t shape[2] = {};  // of what comes before: `axes` numbers

    Cache(const char* name, nb::handle object, int64_t dim, int axes = 2) : name(name) {
        nb::ndarray<nb::device::cpu> found;
        if (!nb::try_cast(object, found, false)) wrong(name, "expected a writable numpy array");
        if (found.dtype() == nb::dtype<uint16_t>()) fill(Array<uint16_t>(name, object, axes + 2), axes, dim, Codec::BF16);
        else if (found.dtype() == nb::dtype<float>()) fill(Array<float>(name, object, axes + 2), axes, dim, Codec::F32);
        else if (found.dtype() == nb::dtype<uint8_t>()) fill(Array<uint8_t>(name, object, axes + 2), axes, dim);
        else wrong(name, "expected uint16 (bfloat16 bits), float32 or uint8");
    }

   private:
    template <typename T>
    void fill(const Array<T>& kv, int axes, int64_t dim, Codec codec) {
        const bool keys_only = kv.shape[axes] == 1;
        if (!keys_only) kv.expect(axes, 2);
        if (kv.shape[axes + 1] != dim)
            wrong(name, "expected heads of " + std::to_string(dim) + ", found " + std::to_string(kv.shape[axes + 1]));
        take(kv, axes, {codec, codec, keys_only});
    }
    void fill(const Array<uint8_t>& kv, int axes, int64_t dim) {
        kv.expect(axes, 1);
        take(kv, axes, kv_codecs(name, kv.shape[axes + 1], dim));
    }
    template <typename T>
    void take(const Array<T>& kv, int axes, KvCodecs found) {
        kv.contiguous(axes + 2);
        data = kv.data;
        codecs = found;
        for (int i = 0; i < axes; ++i) shape[i] = kv.shape[i];
    }
};

// Numbers of a value that a result of `width` numbers has for each of `heads`, whose keys have `dim`.
inline int values_of(const char* name, int64_t width, int64_t heads, int64_t dim) {
    const int64_t values = heads ? width / heads : dim;
    if (values < 1 || values > dim || values * heads != width)
        wrong(name, "expected " + std::to_string(heads) + " heads of up to " + std::to_string(dim) + " numbers, found " +
                        std::to_string(width));
    return static_cast<int>(values);
}

inline void check_blocks(Codec codec, int64_t k, const char* name) {
    if (is_kept(codec) && k % kept_block(codec).weights)
        wrong(name, "rows of " + std::to_string(k) + " are not whole blocks of " +
                        std::to_string(kept_block(codec).weights) + " weights");
}

// Bundles of at least `rows` packed rows of `k` weights.
inline Rows bundles_of(nb::handle object, int codec, int rows, int64_t k, const char* name = "bundles") {
    if (k < 1 || k > LONGEST_ROW)
        wrong("x", "rows of 1 to " + std::to_string(LONGEST_ROW) + " are supported, found " + std::to_string(k));
    const Array<const uint8_t> b(name, object, 2);
    check_blocks(static_cast<Codec>(codec), k, "x");
    const int64_t need = rows * static_cast<int64_t>(row_bytes(static_cast<Codec>(codec), static_cast<int>(k)));
    if (b.shape[1] < need)
        wrong(name, std::to_string(rows) + " rows of " + std::to_string(k) + " weights take " +
                             std::to_string(need) + " bytes, found " + std::to_string(b.shape[1]));
    return {static_cast<Codec>(codec), static_cast<int>(k), b.data, static_cast<size_t>(b.step[0]), b.shape[0]};
}

// The scratch memory: the caller's, or memory of its own when that is None.
class Scratch {
   public:
    Scratch(nb::handle object, size_t need) {
        if (object.is_none()) {
            own_.resize(need);
            data_ = own_.data();
            return;
        }
        const Array<uint8_t> memory("scratch", object, 1);
        if (memory.shape[0] < static_cast<int64_t>(need))
            wrong("scratch", std::to_string(need) + " bytes are needed, found " + std::to_string(memory.shape[0]));
        data_ = memory.data;
    }
    void* data() const { return data_; }

   private:
    std::string own_;
    void* data_ = nullptr;
};

}  // namespace flashrt
