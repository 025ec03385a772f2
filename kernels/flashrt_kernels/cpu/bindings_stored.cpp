// Numbers as checkpoints store them, from Python; see stored.py.

#include "arguments.h"
#include "stored.h"

namespace flashrt {
namespace {

using Released = nb::gil_scoped_release;

StoredRows rows_of(nb::handle raw_, int number) {
    if (number < 0 || number >= STORED_KINDS) wrong("stored", "no such way: " + std::to_string(number));
    const Stored stored = static_cast<Stored>(number);
    const Array<const uint8_t> raw("raw", raw_, 2);
    const int bytes = block_of(stored).bytes;
    if (raw.shape[1] == 0 || raw.shape[1] % bytes != 0)
        wrong("raw", "expected rows of whole blocks of " + std::to_string(bytes) + " bytes, found " +
                         std::to_string(raw.shape[1]) + " bytes");
    return {stored, raw.data, raw.shape[0], static_cast<size_t>(raw.step[0]), raw.shape[1] / bytes};
}

int64_t width_of(const StoredRows& rows) { return rows.blocks * block_of(rows.stored).numbers; }

void py_rows(nb::handle raw, int stored, nb::handle out_) {
    const StoredRows rows = rows_of(raw, stored);
    const Array<float> out("out", out_, 2);
    out.expect(0, rows.rows);
    out.expect(1, width_of(rows));
    if (rows.rows == 0) return;
    out.contiguous(2);
    Released release;
    stored_rows(rows, out.data);
}

void py_columns(nb::handle raw, int stored, int64_t start, int64_t stop, nb::handle out_) {
    const StoredRows rows = rows_of(raw, stored);
    if (start < 0 || stop < start || stop > width_of(rows))
        wrong("start", "columns " + std::to_string(start) + ":" + std::to_string(stop) + " of " +
                           std::to_string(width_of(rows)));
    const Array<float> out("out", out_, 2);
    out.expect(0, stop - start);
    out.expect(1, rows.rows);
    if (rows.rows == 0 || start == stop) return;
    out.contiguous(2);
    Released release;
    stored_columns(rows, start, stop, out.data);
}

bool py_finite(nb::handle values_) {
    const Array<const float> values("values", values_, 2);
    if (values.size() == 0) return true;
    values.contiguous(2);
    Released release;
    return finite(values.data, values.size());
}

}  // namespace

void bind_stored(nb::module_& m) {
    m.def("stored_rows", &py_rows);
    m.def("stored_columns", &py_columns);
    m.def("finite", &py_finite);
}

}  // namespace flashrt
