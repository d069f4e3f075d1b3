// What lies between a block's matrix products on a CPU, each in one pass over its rows:
//
//   out = residual + factor norm(branch + plus)    the bias of the branch's last layer, LayerNorm, the factor of a
//                                                  sample's stochastic depth, the residual; forward and backward
//   y = gelu(x)                                    the exact (erf) GELU, and its slope at x
//
// Everything is float32, and channels are a multiple of ROUND.
//
// Every result is the same bit for bit whatever the number of threads: rows are cut into chunks by the sizes alone, a
// chunk adds up its rows in order, and the caller adds up the chunks.

#include <algorithm>
#include <cmath>

#include "cpu_vectors.h"

namespace {

struct Rows {
  long rows, channels;
  long of_sample;  // rows that share a factor
  long chunks;     // of the rows
  float eps;
  long first(long chunk) const { return chunk * rows / chunks; }
};

void norm_chunk(const Rows& s, const float* branch, const float* plus, const float* residual, const float* factors,
                const float* weight, const float* bias, float* out, float* means, float* inverses, long chunk) {
  const long c = s.channels;
  for (long row = s.first(chunk); row < s.first(chunk + 1); row++) {
    const float *x = branch + row * c, *add = residual + row * c;
    float* y = out + row * c;
    Vector total{}, squares{};
    for (long j = 0; j < c; j += LANES) total += load(x + j) + load(plus + j);
    const float mean = sum(total) / c;
    for (long j = 0; j < c; j += LANES) {
      const Vector apart = load(x + j) + load(plus + j) - mean;
      squares += apart * apart;
    }
    const float inverse = 1.0f / std::sqrt(sum(squares) / c + s.eps);
    const float factor = factors ? factors[row / s.of_sample] : 1.0f;
    for (long j = 0; j < c; j += LANES) {
      const Vector normed = (load(x + j) + load(plus + j) - mean) * inverse * load(weight + j) + load(bias + j);
      store(y + j, load(add + j) + normed * factor);
    }
    means[row] = mean;
    inverses[row] = inverse;
  }
}

// grad_weight, grad_bias and grad_plus: (C) each, of this chunk.
void norm_gradient_chunk(const Rows& s, const float* grad, const float* branch, const float* plus, const float* factors,
                         const float* weight, const float* means, const float* inverses, float* grad_branch,
                         float* grad_weight, float* grad_bias, float* grad_plus, long chunk) {
  const long c = s.channels;
  std::fill(grad_weight, grad_weight + c, 0.0f);
  std::fill(grad_bias, grad_bias + c, 0.0f);
  std::fill(grad_plus, grad_plus + c, 0.0f);
  for (long row = s.first(chunk); row < s.first(chunk + 1); row++) {
    const float *x = branch + row * c, *g = grad + row * c;
    float* to = grad_branch + row * c;
    const float mean = means[row], inverse = inverses[row], factor = factors ? factors[row / s.of_sample] : 1.0f;
    Vector total{}, along{};
    for (long j = 0; j < c; j += LANES) {
      const Vector normed = (load(x + j) + load(plus + j) - mean) * inverse, each = load(g + j) * factor;
      const Vector weighted = each * load(weight + j);
      total += weighted;
      along += weighted * normed;
      store(grad_weight + j, load(grad_weight + j) + each * normed);
      store(grad_bias + j, load(grad_bias + j) + each);
    }
    const float shift = sum(total) / c, share = sum(along) / c;
    for (long j = 0; j < c; j += LANES) {
      const Vector normed = (load(x + j) + load(plus + j) - mean) * inverse;
      const Vector made = (load(g + j) * factor * load(weight + j) - shift - normed * share) * inverse;
      store(to + j, made);
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

void gelu_chunk(const Rows& s, const float* x, float* y, float* slope, long chunk) {
  for (long j = s.first(chunk) * s.channels; j < s.first(chunk + 1) * s.channels; j += LANES) {
    const Vector at = load(x + j);
    Vector below, density;
    normal(at, below, density);
    store(y + j, at * below);
    if (slope) store(slope + j, below + at * density);
  }
}

}  // namespace

// All arrays are contiguous.  factors may be null: all are 1.  slope may be null: it is not asked for.
extern "C" void add_norm_forward(const Rows* s, const float* branch, const float* plus, const float* residual,
                                 const float* factors, const float* weight, const float* bias, float* out, float* means,
                                 float* inverses, int threads) {
#pragma omp parallel for schedule(dynamic) num_threads(threads)
  for (long chunk = 0; chunk < s->chunks; chunk++)
    norm_chunk(*s, branch, plus, residual, factors, weight, bias, out, means, inverses, chunk);
}

// grad_weight, grad_bias, grad_plus: (chunks, C), one chunk's share each.  The residual's gradient is grad.
extern "C" void add_norm_backward(const Rows* s, const float* grad, const float* branch, const float* plus,
                                  const float* factors, const float* weight, const float* means, const float* inverses,
                                  float* grad_branch, float* grad_weight, float* grad_bias, float* grad_plus,
                                  int threads) {
#pragma omp parallel for schedule(dynamic) num_threads(threads)
  for (long chunk = 0; chunk < s->chunks; chunk++) {
    const long at = chunk * s->channels;
    norm_gradient_chunk(*s, grad, branch, plus, factors, weight, means, inverses, grad_branch, grad_weight + at,
                        grad_bias + at, grad_plus + at, chunk);
  }
}

extern "C" void gelu(const Rows* s, const float* x, float* y, float* slope, int threads) {
#pragma omp parallel for schedule(dynamic) num_threads(threads)
  for (long chunk = 0; chunk < s->chunks; chunk++) gelu_chunk(*s, x, y, slope, chunk);
}
