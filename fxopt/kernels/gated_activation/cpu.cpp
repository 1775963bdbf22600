// gated_activation on the CPU: activation and product in cache; halves of one tensor stay views.
#include <torch/library.h>

#include "fxopt/kernels/native/linear.h"
#include "fxopt/kernels/native/rows.h"

namespace fxopt {
namespace {

// Elements of a row done at a time.
constexpr int64_t kPiece = 1024;

template <typename T>
void gate_rows(const Matrix& gate, const Matrix& up, Activation activation, T* y) {
  using C = compute_t<T>;
  const int64_t n = gate.k;
  parallel_rows(gate.m, n, [&](int64_t first, int64_t last) {
    C g[kPiece];
    C u[kPiece];
    for (int64_t m = first; m < last; ++m) {
      for (int64_t start = 0; start < n; start += kPiece) {
        const int64_t count = std::min(kPiece, n - start);
        load_row(static_cast<const T*>(gate.data) + m * gate.ld + start, g, count);
        const C* other =
            as_compute(static_cast<const T*>(up.data) + m * up.ld + start, u, count);
        activate(activation, g, count);
        for (int64_t i = 0; i < count; ++i) g[i] *= other[i];
        store_row(g, y + m * n + start, count);
      }
    }
  });
}

at::Tensor gated_activation(const at::Tensor& gate, const at::Tensor& up,
                            c10::string_view activation) {
  const Activation act = parse_activation(activation);
  FXOPT_CHECK(gate.dim() >= 1 && gate.sizes() == up.sizes() &&
                  gate.scalar_type() == up.scalar_type(),
              "gate and up must have one shape and dtype, got ",
              c10::toString(gate.scalar_type()), " ", gate.sizes(), " and ",
              c10::toString(up.scalar_type()), " ", up.sizes());
  check_floating(gate.scalar_type(), "gate");
  at::Tensor y = at::empty(gate.sizes(), gate.options());
  if (y.numel() == 0) return y;
  const Matrix gates = as_matrix(gate);
  const Matrix ups = as_matrix(up);
  dispatch_floating(gate.scalar_type(), "gate", [&](auto sample) {
    using T = decltype(sample);
    gate_rows(gates, ups, act, y.mutable_data_ptr<T>());
  });
  return y;
}

}  // namespace

TORCH_LIBRARY_IMPL(fxopt, CPU, m) { m.impl("gated_activation", TORCH_FN(gated_activation)); }

}  // namespace fxopt
