// Python entry points. The wrappers in __init__.py check shapes; here arrays become pointers and the GIL is released.

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>

#include <optional>

#include "ops.h"
#include "pool.h"

namespace nb = nanobind;

namespace flashrt {
namespace {

// Arrays arrive as they are: nothing is converted or copied behind the caller's back.
template <typename T, int D>
using Array = nb::ndarray<T, nb::ndim<D>, nb::device::cpu>;
template <typename T>
using Vector = std::optional<nb::ndarray<const T, nb::ndim<1>, nb::device::cpu>>;
using Any = nb::ndarray<nb::device::cpu>;
using Released = nb::call_guard<nb::gil_scoped_release>;

template <typename T>
const T* pointer(const Vector<T>& v) {
    return v ? v->data() : nullptr;
}

Rows rows_of(const Array<const uint8_t, 2>& bundles, int codec, int k) {
    return {static_cast<Codec>(codec), k, bundles.data(), static_cast<size_t>(bundles.stride(0)),
            static_cast<int64_t>(bundles.shape(0))};
}

LinearJob linear_job(const Array<const float, 2>& x, const Array<const uint8_t, 2>& bundles, int codec,
                     const Array<float, 2>& out, int64_t row0, int64_t rows, const Vector<float>& bias) {
    return {x.data(), static_cast<size_t>(x.stride(0)), static_cast<int>(x.shape(0)),
            rows_of(bundles, codec, static_cast<int>(x.shape(1))), out.data(), static_cast<size_t>(out.stride(0)), row0,
            rows, pointer(bias)};
}

GluJob glu_job(const Array<const float, 2>& x, const Array<const uint8_t, 2>& bundles, int codec, int activation,
               bool gated, const Array<float, 2>& y, const Vector<float>& up_bias, const Vector<int32_t>& tokens,
               const Vector<float>& weights) {
    return {x.data(), static_cast<size_t>(x.stride(0)), y.data(), static_cast<size_t>(y.stride(0)),
            static_cast<int>(tokens ? tokens->shape(0) : x.shape(0)), pointer(tokens), pointer(weights),
            rows_of(bundles, codec, static_cast<int>(x.shape(1))), static_cast<Activation>(activation), gated,
            pointer(up_bias)};
}

bool is_half(const Any& kv) { return kv.dtype().bits == 16; }

}  // namespace
}  // namespace flashrt

using namespace flashrt;

NB_MODULE(_cpu, m) {
    m.def("set_threads", &set_threads, Released());
    m.def("threads", &threads);
    m.def("isa", [] { return std::string(isa()); });
    m.def("force_isa", [](const std::optional<std::string>& name) { return force_isa(name ? name->c_str() : nullptr); },
          nb::arg("name").none());
    m.def("available_isas", [] {
        const char* names[8];
        nb::list result;
        const int count = available_isas(names, 8);
        for (int i = 0; i < count; ++i) result.append(nb::str(names[i]));
        return result;
    });
    m.def("reserve", &reserve);

    m.def("linear",
          [](Array<const float, 2> x, Array<const uint8_t, 2> bundles, int codec, Array<float, 2> out, int64_t row0,
             int64_t rows, Vector<float> bias) {
              const LinearJob job = linear_job(x, bundles, codec, out, row0, rows, bias);
              nb::gil_scoped_release release;
              linear(job);
          },
          nb::arg().noconvert(), nb::arg().noconvert(), nb::arg(), nb::arg().noconvert(), nb::arg(), nb::arg(),
          nb::arg().noconvert().none());
    m.def("glu",
          [](Array<const float, 2> x, Array<const uint8_t, 2> bundles, int codec, int activation, bool gated,
             Array<float, 2> y, Vector<float> up_bias, Vector<int32_t> tokens, Vector<float> weights) {
              const GluJob job = glu_job(x, bundles, codec, activation, gated, y, up_bias, tokens, weights);
              nb::gil_scoped_release release;
              glu(job);
          },
          nb::arg().noconvert(), nb::arg().noconvert(), nb::arg(), nb::arg(), nb::arg(), nb::arg().noconvert(),
          nb::arg().noconvert().none(), nb::arg().noconvert().none(), nb::arg().noconvert().none());
    m.def("gemm_scratch_bytes", &gemm_scratch_bytes);
    m.def("gemm_linear",
          [](Array<const float, 2> x, Array<const uint8_t, 2> bundles, int codec, Array<float, 2> out, int64_t row0,
             int64_t rows, Vector<float> bias, Array<uint8_t, 1> scratch) {
              const LinearJob job = linear_job(x, bundles, codec, out, row0, rows, bias);
              nb::gil_scoped_release release;
              gemm_linear(job, scratch.data());
          },
          nb::arg().noconvert(), nb::arg().noconvert(), nb::arg(), nb::arg().noconvert(), nb::arg(), nb::arg(),
          nb::arg().noconvert().none(), nb::arg().noconvert());
    m.def("gemm_glu",
          [](Array<const float, 2> x, Array<const uint8_t, 2> bundles, int codec, int activation, bool gated,
             Array<float, 2> y, Vector<float> up_bias, Vector<int32_t> tokens, Vector<float> weights,
             Array<uint8_t, 1> scratch) {
              const GluJob job = glu_job(x, bundles, codec, activation, gated, y, up_bias, tokens, weights);
              nb::gil_scoped_release release;
              gemm_glu(job, scratch.data());
          },
          nb::arg().noconvert(), nb::arg().noconvert(), nb::arg(), nb::arg(), nb::arg(), nb::arg().noconvert(),
          nb::arg().noconvert().none(), nb::arg().noconvert().none(), nb::arg().noconvert().none(),
          nb::arg().noconvert());

    m.def("attention_scratch_bytes", &attention_scratch_bytes);
    m.def("attention",
          [](Array<const float, 3> q, Any kv, int start, int window, float scale, float softcap, Array<float, 2> out,
             Array<uint8_t, 1> scratch) {
              const AttentionJob job = {q.data(), static_cast<size_t>(q.stride(0)), static_cast<int>(q.shape(0)),
                                        static_cast<int>(q.shape(1)), static_cast<int>(kv.shape(0)),
                                        static_cast<int>(q.shape(2)), kv.data(), is_half(kv),
                                        static_cast<int64_t>(kv.shape(1)), start, window, scale, softcap, out.data(),
                                        static_cast<size_t>(out.stride(0)), scratch.data()};
              nb::gil_scoped_release release;
              attention(job);
          },
          nb::arg().noconvert(), nb::arg().noconvert(), nb::arg(), nb::arg(), nb::arg(), nb::arg(),
          nb::arg().noconvert(), nb::arg().noconvert());
    m.def("kv_append",
          [](Array<const float, 3> k, Array<const float, 3> v, Any kv, int64_t start) {
              nb::gil_scoped_release release;
              kv_append(k.data(), k.stride(0), v.data(), v.stride(0), static_cast<int>(k.shape(0)),
                        static_cast<int>(k.shape(1)), static_cast<int>(k.shape(2)), kv.data(), is_half(kv),
                        static_cast<int64_t>(kv.shape(1)), start);
          },
          nb::arg().noconvert(), nb::arg().noconvert(), nb::arg().noconvert(), nb::arg());

    m.def("rms_norm",
          [](Array<const float, 2> x, Array<const float, 1> weight, float eps, Array<float, 2> out) {
              nb::gil_scoped_release release;
              rms_norm(x.data(), x.stride(0), static_cast<int64_t>(x.shape(0)), static_cast<int>(x.shape(1)),
                       weight.data(), eps, out.data(), out.stride(0));
          },
          nb::arg().noconvert(), nb::arg().noconvert(), nb::arg(), nb::arg().noconvert());
    m.def("layer_norm",
          [](Array<const float, 2> x, Array<const float, 1> weight, Vector<float> bias, float eps, Array<float, 2> out) {
              nb::gil_scoped_release release;
              layer_norm(x.data(), x.stride(0), static_cast<int64_t>(x.shape(0)), static_cast<int>(x.shape(1)),
                         weight.data(), pointer(bias), eps, out.data(), out.stride(0));
          },
          nb::arg().noconvert(), nb::arg().noconvert(), nb::arg().noconvert().none(), nb::arg(), nb::arg().noconvert());
    m.def("rope",
          [](Array<float, 3> x, Array<const float, 2> cos, Array<const float, 2> sin) {
              nb::gil_scoped_release release;
              rope(x.data(), x.stride(0), x.stride(1), static_cast<int>(x.shape(0)), static_cast<int>(x.shape(1)),
                   static_cast<int>(x.shape(2)), cos.data(), sin.data());
          },
          nb::arg().noconvert(), nb::arg().noconvert(), nb::arg().noconvert());

    m.def("quantize",
          [](Array<const float, 2> w, int codec, Vector<float> importance, Array<uint8_t, 2> out) {
              nb::gil_scoped_release release;
              quantize(static_cast<Codec>(codec), w.data(), static_cast<int64_t>(w.shape(0)),
                       static_cast<int>(w.shape(1)), pointer(importance), out.data(), out.stride(0));
          },
          nb::arg().noconvert(), nb::arg(), nb::arg().noconvert().none(), nb::arg().noconvert());
    m.def("dequantize",
          [](Array<const uint8_t, 2> rows, int codec, Array<float, 2> out) {
              nb::gil_scoped_release release;
              dequantize(static_cast<Codec>(codec), rows.data(), rows.stride(0), static_cast<int64_t>(rows.shape(0)),
                         static_cast<int>(out.shape(1)), out.data(), out.stride(0));
          },
          nb::arg().noconvert(), nb::arg(), nb::arg().noconvert());
    m.def("read_all",
          [](Array<const uint8_t, 1> data) {
              nb::gil_scoped_release release;
              return read_all(data.data(), data.size());
          },
          nb::arg().noconvert());
}
