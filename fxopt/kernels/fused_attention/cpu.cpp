// fused_attention on the CPU. Our kernel reads a key once for all queries of its group, skips the
// keys that causal and window hide, and splits long keys among threads. Many queries that see all
// keys go to ATen, whose matrix products are the faster ones there.
#include <ATen/ops/empty.h>
#include <ATen/ops/scaled_dot_product_attention.h>
#include <ATen/ops/where.h>
#include <torch/library.h>

#include <optional>

#include "fxopt/kernels/native/attention.h"
#include "fxopt/kernels/native/rows.h"

namespace fxopt {
namespace {

// Up to this many queries our kernel is the faster even where they see all keys (measured).
constexpr int64_t kFewQueries = 8;
// Queries of one task, and the keys whose scores are held at a time.
constexpr int64_t kQueryBlock = 16;
constexpr int64_t kKeyBlock = 512;
constexpr int64_t kScoreStride = kKeyBlock + 16;

// Attention without its tensors: sizes, and which keys a query sees.
struct Problem {
  int64_t batch, heads, kv_heads, queries, keys, width, value_width;
  float scale;
  bool causal;
  int64_t window;  // distances below it are seen; keys + queries where there is none
  float softcap;   // zero where there is none

  int64_t group() const { return heads / kv_heads; }
  int64_t position(int64_t query) const { return query + keys - queries; }
  // Query i sees keys [first_key(i), end_key(i)), as far as causal and window go.
  int64_t first_key(int64_t query) const {
    return std::max<int64_t>(0, position(query) - window + 1);
  }
  int64_t end_key(int64_t query) const {
    return std::min(keys, position(query) + (causal ? std::min<int64_t>(1, window) : window));
  }
  // Neither causal nor window hides anything.
  bool sees_all_keys() const { return !causal && window >= std::max(keys, queries); }
};

// The tensors that say more about which keys are seen.
struct Masks {
  at::Tensor padding;  // bool [B, T] contiguous, undefined where all is kept
  at::Tensor mask;     // expanded to [B, H, S, T], or undefined
  at::Tensor sinks;    // float32 [H], or undefined
};

// Folds the explicit mask of keys [first, first + count) into scores.
void apply_mask(const at::Tensor& mask, int64_t b, int64_t h, int64_t s, int64_t first,
                int64_t count, float* __restrict scores) {
  const int64_t step = mask.stride(3);
  const int64_t offset =
      b * mask.stride(0) + h * mask.stride(1) + s * mask.stride(2) + first * step;
  if (mask.scalar_type() == at::kBool) {
    const bool* keep = mask.const_data_ptr<bool>() + offset;
    for (int64_t j = 0; j < count; ++j) scores[j] = keep[j * step] ? scores[j] : kHidden;
    return;
  }
  dispatch_floating(mask.scalar_type(), "mask", [&](auto sample) {
    const auto* add = mask.const_data_ptr<decltype(sample)>() + offset;
    for (int64_t j = 0; j < count; ++j) scores[j] += static_cast<float>(add[j * step]);
  });
}

// What the rows of a task hold while the keys pass: maximum, sum of weights, weighted values.
struct State {
  float* top;
  float* sum;
  float* values;

  static int64_t size(int64_t rows, int64_t width) { return round_up(rows * (width + 2), 16); }
  State(float* at, int64_t rows) : top(at), sum(at + rows), values(at + 2 * rows) {}
};

template <typename T>
class Attention {
 public:
  Attention(const Problem& problem, const Masks& masks, const at::Tensor& q, const at::Tensor& k,
            const at::Tensor& v, at::Tensor& y)
      : p_(problem), masks_(masks), q_(q), k_(k), v_(v), y_(y.mutable_data_ptr<T>()) {
    blocks_ = (p_.queries + kQueryBlock - 1) / kQueryBlock;
    const int64_t threads = at::get_num_threads();
    const int64_t tasks = p_.batch * p_.kv_heads * blocks_;
    if (tasks < 4 * threads && tasks % threads != 0)
      splits_ = std::clamp<int64_t>(p_.keys / 128, 1, threads);
  }

  void run() {
    const int64_t tasks = p_.batch * p_.kv_heads * blocks_;
    const int64_t rows = std::min(kQueryBlock, p_.queries) * p_.group();
    const int64_t size = State::size(rows, p_.value_width);
    const int64_t work = rows * (p_.keys / splits_ + 16) * (p_.width + p_.value_width);
    const int64_t grain = std::max<int64_t>(1, (1 << 18) / work);
    Buffer<float> partial(splits_ == 1 ? 0 : tasks * splits_ * size);
    at::parallel_for(0, tasks * splits_, grain, [&](int64_t first, int64_t last) {
      Buffer<float> own(splits_ == 1 ? size : 0);
      Buffer<float> queries(rows * padded_width());
      Buffer<float> scores(kQueryRows * kScoreStride);
      for (int64_t i = first; i < last; ++i) {
        const Task task(p_, blocks_, i / splits_);
        const State state(splits_ == 1 ? own.get() : partial + i * size, task.rows);
        attend(task, i % splits_, queries, scores, state);
        if (splits_ == 1) finish(task, state);
      }
    });
    if (splits_ == 1) return;
    for (int64_t i = 0; i < tasks; ++i) {
      const Task task(p_, blocks_, i);
      const State state(partial + i * splits_ * size, task.rows);
      for (int64_t split = 1; split < splits_; ++split)
        merge(State(partial + (i * splits_ + split) * size, task.rows), task.rows, state);
      finish(task, state);
    }
  }

 private:
  // Queries [first, first + count) of all heads that share a key head; row = head * count + query.
  struct Task {
    int64_t b, kv_head, first, count, rows;

    Task(const Problem& p, int64_t blocks, int64_t index)
        : b(index / blocks / p.kv_heads),
          kv_head(index / blocks % p.kv_heads),
          first(index % blocks * kQueryBlock),
          count(std::min(kQueryBlock, p.queries - first)),
          rows(count * p.group()) {}
  };

  int64_t padded_width() const { return round_up(p_.width, 16); }
  int64_t head(const Task& task, int64_t row) const {
    return task.kv_head * p_.group() + row / task.count;
  }
  static int64_t query(const Task& task, int64_t row) { return task.first + row % task.count; }

  void load_queries(const Task& task, float* queries) const {
    const int64_t ld = padded_width();
    for (int64_t r = 0; r < task.rows; ++r) {
      const T* from = q_.const_data_ptr<T>() + task.b * q_.stride(0) +
                      head(task, r) * q_.stride(1) + query(task, r) * q_.stride(2);
      float* to = queries + r * ld;
      load_row(from, to, p_.width);
      for (int64_t i = 0; i < p_.width; ++i) to[i] *= p_.scale;
      std::memset(to + p_.width, 0, (ld - p_.width) * sizeof(float));
    }
  }

  void attend(const Task& task, int64_t split, float* queries, float* scores,
              const State& state) const {
    load_queries(task, queries);
    std::fill_n(state.top, task.rows, kHidden);
    std::memset(state.sum, 0, task.rows * (p_.value_width + 1) * sizeof(float));
    const int64_t first = p_.first_key(task.first);
    const int64_t end = p_.end_key(task.first + task.count - 1);
    const int64_t each = (std::max<int64_t>(0, end - first) + splits_ - 1) / splits_;
    const int64_t stop = std::min(end, first + (split + 1) * each);
    for (int64_t key = first + split * each; key < stop; key += kKeyBlock) {
      const int64_t count = std::min(kKeyBlock, stop - key);
      for (int64_t row = 0; row < task.rows; row += kQueryRows)
        with_row_count(std::min(kQueryRows, task.rows - row), [&](auto rows) {
          attend_rows<rows>(task, row, key, count, queries, scores, state);
        });
    }
  }

  template <int ROWS>
  void attend_rows(const Task& task, int64_t row, int64_t key, int64_t count, const float* queries,
                   float* scores, const State& state) const {
    const T* k = k_.const_data_ptr<T>() + task.b * k_.stride(0) + task.kv_head * k_.stride(1) +
                 key * k_.stride(2);
    const T* v = v_.const_data_ptr<T>() + task.b * v_.stride(0) + task.kv_head * v_.stride(1) +
                 key * v_.stride(2);
    const int64_t ld = padded_width();
    score_rows<ROWS>(queries + row * ld, ld, k, k_.stride(2), count, p_.width, scores,
                     kScoreStride);
    float decay[ROWS];
    for (int r = 0; r < ROWS; ++r) {
      float* own = scores + r * kScoreStride;
      mask_row(task, row + r, key, count, own);
      decay[r] = weigh(own, count, state.top + row + r, state.sum + row + r);
    }
    weigh_rows<ROWS>(scores, kScoreStride, v, v_.stride(2), count, p_.value_width, decay,
                     state.values + row * p_.value_width, p_.value_width);
  }

  void mask_row(const Task& task, int64_t row, int64_t key, int64_t count,
                float* __restrict scores) const {
    if (p_.softcap != 0.0f) {
      const float cap = p_.softcap;
      for (int64_t j = 0; j < count; ++j) scores[j] = cap * hyperbolic_tangent(scores[j] / cap);
    }
    const int64_t s = query(task, row);
    if (masks_.mask.defined())
      apply_mask(masks_.mask, task.b, head(task, row), s, key, count, scores);
    if (masks_.padding.defined()) {
      const bool* keep = masks_.padding.const_data_ptr<bool>() + task.b * p_.keys + key;
      for (int64_t j = 0; j < count; ++j) scores[j] = keep[j] ? scores[j] : kHidden;
    }
    const int64_t first = std::clamp<int64_t>(p_.first_key(s) - key, 0, count);
    const int64_t end = std::clamp<int64_t>(p_.end_key(s) - key, first, count);
    std::fill_n(scores, first, kHidden);
    std::fill(scores + end, scores + count, kHidden);
  }

  // Scores become weights relative to the new maximum; returns what earlier sums shrink by.
  static float weigh(float* __restrict scores, int64_t count, float* top, float* sum) {
    float largest = *top;
    int64_t j = 0;
    alignas(64) float lanes[kSumLanes];
    std::fill_n(lanes, kSumLanes, largest);
    for (; j + kSumLanes <= count; j += kSumLanes)
      for (int64_t i = 0; i < kSumLanes; ++i)
        lanes[i] = scores[j + i] > lanes[i] ? scores[j + i] : lanes[i];
    for (; j < count; ++j) lanes[0] = scores[j] > lanes[0] ? scores[j] : lanes[0];
    for (int64_t i = 0; i < kSumLanes; ++i) largest = lanes[i] > largest ? lanes[i] : largest;
    // Where nothing is seen yet, hidden keys must weigh zero and not NaN.
    const float shift = largest == kHidden ? 0.0f : largest;
    const float decay = softmax_weight(*top - shift);
    for (int64_t i = 0; i < count; ++i) scores[i] = softmax_weight(scores[i] - shift);
    *top = largest;
    *sum = *sum * decay + sum_row<float>(count, [&](int64_t i) { return scores[i]; });
    return decay;
  }

  // Adds what `other` saw to `into`.
  void merge(const State& other, int64_t rows, const State& into) const {
    const int64_t n = p_.value_width;
    for (int64_t r = 0; r < rows; ++r) {
      const float top = std::max(into.top[r], other.top[r]);
      const float shift = top == kHidden ? 0.0f : top;
      const float a = softmax_weight(into.top[r] - shift);
      const float b = softmax_weight(other.top[r] - shift);
      const float* from = other.values + r * n;
      float* to = into.values + r * n;
      into.top[r] = top;
      into.sum[r] = into.sum[r] * a + other.sum[r] * b;
      for (int64_t i = 0; i < n; ++i) to[i] = to[i] * a + from[i] * b;
    }
  }

  void finish(const Task& task, const State& state) const {
    const int64_t n = p_.value_width;
    for (int64_t r = 0; r < task.rows; ++r) {
      const int64_t h = head(task, r);
      float sum = state.sum[r];
      float factor = 1.0f;
      if (masks_.sinks.defined()) {
        const float sink = masks_.sinks.const_data_ptr<float>()[h];
        const float top = std::max(state.top[r], sink);
        const float shift = top == kHidden ? 0.0f : top;
        factor = softmax_weight(state.top[r] - shift);
        sum = sum * factor + softmax_weight(sink - shift);
      }
      factor = sum == 0.0f ? 0.0f : factor / sum;
      float* row = state.values + r * n;
      for (int64_t i = 0; i < n; ++i) row[i] *= factor;
      store_row(row, y_ + ((task.b * p_.queries + query(task, r)) * p_.heads + h) * n, n);
    }
  }

  const Problem& p_;
  const Masks& masks_;
  const at::Tensor& q_;
  const at::Tensor& k_;
  const at::Tensor& v_;
  T* y_;
  int64_t blocks_;
  int64_t splits_ = 1;
};

// ---- ATen ----

at::Tensor by_aten(const Problem& p, const at::Tensor& padding,
                   const std::optional<at::Tensor>& mask, const at::Tensor& q,
                   const at::Tensor& k, const at::Tensor& v) {
  std::optional<at::Tensor> merged = mask;
  if (padding.defined()) {
    const at::Tensor keep = padding.unsqueeze(1).unsqueeze(1);
    if (!mask.has_value()) {
      merged = keep;
    } else if (mask->scalar_type() == at::kBool) {
      merged = keep.logical_and(*mask);
    } else {
      merged = at::where(keep, *mask, -std::numeric_limits<double>::infinity());
    }
  }
  if (merged.has_value() && merged->scalar_type() != at::kBool)
    merged = merged->to(q.scalar_type());
  const at::Tensor y = at::scaled_dot_product_attention(q, k, v, merged, 0.0, false, p.scale,
                                                        p.group() != 1);
  const at::Tensor rows = y.transpose(1, 2);
  return rows.is_contiguous() ? y : rows.contiguous().transpose(1, 2);
}

// ---- arguments ----

bool all_true(const at::Tensor& x) {
  return std::memchr(x.const_data_ptr<bool>(), 0, x.numel()) == nullptr;
}

Masks read_masks(const Problem& p, const std::optional<at::Tensor>& padding,
                 const std::optional<at::Tensor>& mask, const std::optional<at::Tensor>& sinks) {
  Masks masks;
  if (padding.has_value()) {
    FXOPT_CHECK(padding->dim() == 2 && padding->size(0) == p.batch && padding->size(1) == p.keys,
                "padding must be [B, T] = [", p.batch, ", ", p.keys, "], got ", padding->sizes());
    const at::Tensor keep = padding->to(at::kBool).contiguous();
    if (!all_true(keep)) masks.padding = keep;
  }
  if (mask.has_value()) {
    if (mask->scalar_type() != at::kBool) check_floating(mask->scalar_type(), "mask");
    masks.mask = mask->expand({p.batch, p.heads, p.queries, p.keys});
  }
  if (sinks.has_value()) {
    FXOPT_CHECK(sinks->numel() == p.heads, "sinks must have H = ", p.heads, " elements, got ",
                sinks->sizes());
    masks.sinks = sinks->to(at::kFloat).contiguous();
  }
  return masks;
}

void check_attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v) {
  FXOPT_CHECK(q.dim() == 4 && k.dim() == 4 && v.dim() == 4, "q, k and v must be [B, H, S, D], got ",
              q.sizes(), ", ", k.sizes(), " and ", v.sizes());
  FXOPT_CHECK(k.size(1) == v.size(1) && k.size(1) > 0 && q.size(1) % k.size(1) == 0,
              "the heads of q must be a multiple of those of k and v, got ", q.size(1), ", ",
              k.size(1), " and ", v.size(1));
  FXOPT_CHECK(q.size(0) == k.size(0) && q.size(0) == v.size(0) && q.size(3) == k.size(3) &&
                  k.size(2) == v.size(2),
              "q, k and v do not fit each other: ", q.sizes(), ", ", k.sizes(), " and ",
              v.sizes());
  FXOPT_CHECK(q.scalar_type() == k.scalar_type() && q.scalar_type() == v.scalar_type(),
              "q, k and v must have one dtype, got ", c10::toString(q.scalar_type()), ", ",
              c10::toString(k.scalar_type()), " and ", c10::toString(v.scalar_type()));
  check_floating(q.scalar_type(), "q");
}

at::Tensor dense_rows(const at::Tensor& x) {
  return x.size(3) <= 1 || x.stride(3) == 1 ? x : x.contiguous();
}

using Signature = at::Tensor(const at::Tensor&, const at::Tensor&, const at::Tensor&,
                             const std::optional<at::Tensor>&, const std::optional<at::Tensor>&,
                             const std::optional<at::Tensor>&, double, bool,
                             std::optional<int64_t>, std::optional<double>);

at::Tensor fused_attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                           const std::optional<at::Tensor>& padding,
                           const std::optional<at::Tensor>& mask,
                           const std::optional<at::Tensor>& sinks, double scale, bool causal,
                           std::optional<int64_t> window, std::optional<double> softcap) {
  check_attention(q, k, v);
  const Problem p{q.size(0), q.size(1), k.size(1), q.size(2), k.size(2), q.size(3), v.size(3),
                  static_cast<float>(scale), causal,
                  std::min(window.value_or(k.size(2) + q.size(2)), k.size(2) + q.size(2)),
                  static_cast<float>(softcap.value_or(0.0))};
  if (q.scalar_type() == at::kDouble) {  // arithmetic in float64 is the reference's
    static const auto attention = c10::Dispatcher::singleton()
                                      .findSchemaOrThrow("fxopt::attention", "")
                                      .typed<Signature>();
    return attention.call(q, k, v, padding, mask, sinks, scale, causal, window, softcap);
  }
  const Masks masks = read_masks(p, padding, mask, sinks);
  const at::Tensor queries = dense_rows(q), keys = dense_rows(k), values = dense_rows(v);
  const bool plain = !softcap.has_value() && !sinks.has_value() && p.sees_all_keys();
  if (plain && p.queries > kFewQueries && q.numel() > 0 && k.numel() > 0 && v.numel() > 0)
    return by_aten(p, masks.padding, mask, queries, keys, values);
  at::Tensor y = at::empty({p.batch, p.queries, p.heads, p.value_width}, q.options());
  if (y.numel() == 0) return y.transpose(1, 2);
  dispatch_floating(q.scalar_type(), "q", [&](auto sample) {
    using T = decltype(sample);
    if constexpr (!std::is_same_v<T, double>) {
      Attention<T>(p, masks, queries, keys, values, y).run();
    }
  });
  return y.transpose(1, 2);
}

}  // namespace

TORCH_LIBRARY_IMPL(fxopt, CPU, m) { m.impl("fused_attention", TORCH_FN(fused_attention)); }

}  // namespace fxopt
