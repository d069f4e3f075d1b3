// What lies between a block's matrix products on a CPU, each in one pass over its rows:
//
//   out = residual + factor norm(branch + plus)    the bias of the branch's last layer, LayerNorm, the factor of a
//                                                  sample's stochastic depth, the residual; forward and backward
//   y = gelu(x)                                    the exact (erf) GELU, forward and backward
//
// Maps (branch, residual, x, y and their gradients) are float32 or bfloat16; everything else is float32, and so is all
// that is computed.  Channels are a multiple of ROUND.
//
// Every result is the same bit for bit whatever the number of threads: rows are cut into chunks by the sizes alone, a
// chunk adds up its rows in order, and the caller adds up the chunks.

#include <algorithm>
#include <cmath>
#include <type_traits>

#include "cpu_vectors.h"

namespace {

struct Rows {
  long rows, channels;
  long of_sample;  // rows that share a factor
  long chunks;     // of the rows
  float eps;
  long first(long chunk) const { return chunk * rows / chunks; }
};

template <typename T>
void norm_chunk(const Rows& s, const T* branch, const float* plus, const T* residual, const float* factors,
                const float* weight, const float* bias, T* out, float* means, float* inverses, long chunk) {
  const long c = s.channels;
  for (long row = s.first(chunk); row < s.first(chunk + 1); row++) {
    const T *x = branch + row * c, *add = residual + row * c;
    T* y = out + row * c;
    Vector total{}, squares{};
    for (long j = 0; j < c; j += LANES) total += widen(x + j) + load(plus + j);
    const float mean = sum(total) / c;
    for (long j = 0; j < c; j += LANES) {
      const Vector apart = widen(x + j) + load(plus + j) - mean;
      squares += apart * apart;
    }
    const float inverse = 1.0f / std::sqrt(sum(squares) / c + s.eps);
    const float factor = factors ? factors[row / s.of_sample] : 1.0f;
    for (long j = 0; j < c; j += LANES) {
      const Vector normed = (widen(x + j) + load(plus + j) - mean) * inverse * load(weight + j) + load(bias + j);
      narrow(widen(add + j) + normed * factor, y + j);
    }
    means[row] = mean;
    inverses[row] = inverse;
  }
}

// grad_weight, grad_bias and grad_plus: (C) each, of this chunk.
template <typename T>
void norm_gradient_chunk(const Rows& s, const T* grad, const T* branch, const float* plus, const float* factors,
                         const float* weight, const float* means, const float* inverses, T* grad_branch,
                         float* grad_weight, float* grad_bias, float* grad_plus, long chunk) {
  const long c = s.channels;
  std::fill(grad_weight, grad_weight + c, 0.0f);
  std::fill(grad_bias, grad_bias + c, 0.0f);
  std::fill(grad_plus, grad_plus + c, 0.0f);
  for (long row = s.first(chunk); row < s.first(chunk + 1); row++) {
    const T *x = branch + row * c, *g = grad + row * c;
    T* to = grad_branch + row * c;
    const float mean = means[row], inverse = inverses[row], factor = factors ? factors[row / s.of_sample] : 1.0f;
    Vector total{}, along{};
    for (long j = 0; j < c; j += LANES) {
      const Vector normed = (widen(x + j) + load(plus + j) - mean) * inverse, each = widen(g + j) * factor;
      const Vector weighted = each * load(weight + j);
      total += weighted;
      along += weighted * normed;
      store(grad_weight + j, load(grad_weight + j) + each * normed);
      store(grad_bias + j, load(grad_bias + j) + each);
    }
    const float shift = sum(total) / c, share = sum(along) / c;
    for (long j = 0; j < c; j += LANES) {
      const Vector normed = (widen(x + j) + load(plus + j) - mean) * inverse;
      const Vector made = (widen(g + j) * factor * load(weight + j) - shift - normed * share) * inverse;
      narrow(made, to + j);
      store(grad_plus + j, load(grad_plus + j) + made);
    }
  }
}

// The normal distribution below x, and its density there.  With t = 1 / (1 + 0.266 |x|), the tail beyond |x| is
// e^(-x^2/2) t Q(t); Q was fitted at Chebyshev's points to 2e-8 of the tail for |x| up to 13, where e^(-x^2/2) ends.
inline void normal(Vector x, Vector& below, Vector& density) {
  const Vector size = x < Vector{} ? -x : x;
  const Vector t = 1.0f / (size * 0.266f + 1.0f);
  const Vector e = exponential(x * x * -0.5f);
  Vector q = fill(0.03095846997f);
  q = q * t - 0.1430754529f;
  q = q * t + 0.2128828768f;
  q = q * t - 0.1120816122f;
  q = q * t + 0.1354402016f;
  q = q * t + 0.06117707742f;
  q = q * t + 0.1029058735f;
  q = q * t + 0.1056519921f;
  q = q * t + 0.1061405812f;
  const Vector tail = q * t * e;
  below = x > Vector{} ? 1.0f - tail : tail;
  density = e * 0.3989422804f;
}

// to = grad gelu'(x), or gelu(x) where there is no grad.
template <typename T>
void gelu_chunk(const Rows& s, const T* x, const T* grad, T* to, long chunk) {
  for (long j = s.first(chunk) * s.channels; j < s.first(chunk + 1) * s.channels; j += LANES) {
    const Vector at = widen(x + j);
    Vector below, density;
    normal(at, below, density);
    narrow(grad ? widen(grad + j) * (below + at * density) : at * below, to + j);
  }
}

}  // namespace

// All arrays are contiguous.  bfloat16: the maps' type.

// factors may be null: all are 1.
extern "C" void add_norm_forward(int bfloat16, const Rows* s, const void* branch, const float* plus,
                                 const void* residual, const float* factors, const float* weight, const float* bias,
                                 void* out, float* means, float* inverses, int threads) {
  const auto all = [=](auto* out) {
    typedef std::remove_pointer_t<decltype(out)> T;
#pragma omp parallel for schedule(dynamic) num_threads(threads)
    for (long chunk = 0; chunk < s->chunks; chunk++)
      norm_chunk(*s, static_cast<const T*>(branch), plus, static_cast<const T*>(residual), factors, weight, bias, out,
                 means, inverses, chunk);
  };
  bfloat16 ? all(static_cast<BFloat16*>(out)) : all(static_cast<float*>(out));
}

// grad_weight, grad_bias, grad_plus: (chunks, C), one chunk's share each.  The residual's gradient is grad.
extern "C" void add_norm_backward(int bfloat16, const Rows* s, const void* grad, const void* branch, const float* plus,
                                  const float* factors, const float* weight, const float* means, const float* inverses,
                                  void* grad_branch, float* grad_weight, float* grad_bias, float* grad_plus,
                                  int threads) {
  const auto all = [=](auto* grad_branch) {
    typedef std::remove_pointer_t<decltype(grad_branch)> T;
#pragma omp parallel for schedule(dynamic) num_threads(threads)
    for (long chunk = 0; chunk < s->chunks; chunk++) {
      const long at = chunk * s->channels;
      norm_gradient_chunk(*s, static_cast<const T*>(grad), static_cast<const T*>(branch), plus, factors, weight, means,
                          inverses, grad_branch, grad_weight + at, grad_bias + at, grad_plus + at, chunk);
    }
  };
  bfloat16 ? all(static_cast<BFloat16*>(grad_branch)) : all(static_cast<float*>(grad_branch));
}

// to: gelu(x), or, where grad is not null, the gradient of x.
extern "C" void gelu(int bfloat16, const Rows* s, const void* x, const void* grad, void* to, int threads) {
  const auto all = [=](auto* to) {
    typedef std::remove_pointer_t<decltype(to)> T;
#pragma omp parallel for schedule(dynamic) num_threads(threads)
    for (long chunk = 0; chunk < s->chunks; chunk++)
      gelu_chunk(*s, static_cast<const T*>(x), static_cast<const T*>(grad), to, chunk);
  };
  bfloat16 ? all(static_cast<BFloat16*>(to)) : all(static_cast<float*>(to));
}
