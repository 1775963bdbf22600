// embedding_int8 on the CPU: rows widened, scaled and rounded once.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "fxopt/kernels/native/buffer.h"
#include "fxopt/kernels/native/numeric.h"

namespace fxopt {
namespace {

template <typename T>
void copy_rows(const int8_t* weight, const float* scale, const int64_t* indices, int64_t count,
               int64_t width, T* out) {
  at::parallel_for(0, count, 32768 / width + 1, [&](int64_t first, int64_t last) {
    Buffer<float> row(width);
    for (int64_t i = first; i < last; ++i) {
      const int8_t* from = weight + indices[i] * width;
      const float s = scale[indices[i]];
      for (int64_t d = 0; d < width; ++d) row[d] = s * static_cast<float>(from[d]);
      store_row(row.get(), out + i * width, width);
    }
  });
}

at::Tensor embedding_int8(const at::Tensor& weight, const at::Tensor& scale,
                          const at::Tensor& indices, at::ScalarType dtype) {
  check_floating(dtype, "dtype");
  FXOPT_CHECK(weight.dim() == 2 && weight.scalar_type() == at::kChar,
              "weight must be int8 [V, D], got ", c10::toString(weight.scalar_type()), " ",
              weight.sizes());
  FXOPT_CHECK(scale.scalar_type() == at::kFloat && scale.numel() == weight.size(0),
              "scale must be float32 with V = ", weight.size(0), " elements, got ",
              c10::toString(scale.scalar_type()), " ", scale.sizes());
  FXOPT_CHECK(indices.scalar_type() == at::kLong || indices.scalar_type() == at::kInt,
              "indices must be int64 or int32, got ", c10::toString(indices.scalar_type()));
  const int64_t width = weight.size(1);
  at::DimVector sizes(indices.sizes().begin(), indices.sizes().end());
  sizes.push_back(width);
  at::Tensor y = at::empty(sizes, weight.options().dtype(dtype));
  const at::Tensor rows = indices.to(at::kLong).contiguous();
  const int64_t* row = rows.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < rows.numel(); ++i) {
    TORCH_CHECK_INDEX(row[i] >= 0 && row[i] < weight.size(0), "embedding_int8: index ", row[i],
                      " is out of range for ", weight.size(0), " rows");
  }
  if (y.numel() == 0) return y;
  const at::Tensor w = weight.contiguous();
  const at::Tensor s = scale.contiguous();
  dispatch_floating(dtype, "dtype", [&](auto sample) {
    copy_rows(w.const_data_ptr<int8_t>(), s.const_data_ptr<float>(), row, rows.numel(), width,
              y.mutable_data_ptr<decltype(sample)>());
  });
  return y;
}

}  // namespace

TORCH_LIBRARY_IMPL(fxopt, CPU, m) { m.impl("embedding_int8", TORCH_FN(embedding_int8)); }

}  // namespace fxopt
