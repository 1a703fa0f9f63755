// What follows an operation's own arithmetic while its results are still in registers, for a channel k:
//
//     y = act(scale[k] · sum + bias[k] + residual)
//
// any part of which may be missing; and in the backward pass the activation's derivative, of its argument or,
// where that is enough, of its result. Activations of an accumulator value z (float or double):
//
//     none         z                                  sigmoid      1 / (1 + e^-z)
//     relu         max(z, 0)                          silu         z · sigmoid(z)
//     relu6        min(max(z, 0), 6)                  gelu         z · Φ(z), Φ by erf
//     leaky_relu   z, or 0.01 z below 0               tanh         tanh(z)
//     hardswish    z · min(max(z + 3, 0), 6) / 6
//
// Values and derivatives are PyTorch's, also where a function has a corner (the derivative of relu at 0 is 0,
// that of relu6 is 0 at 0 and at 6) and for NaN, which passes through every one of them. Comparisons are
// written so that NaN takes the branch that keeps it.
#pragma once
#include "common.cuh"

enum class Activation { none, relu, relu6, silu, gelu, hardswish, leaky_relu, sigmoid, tanh };

template <class A> DEVICE A sigmoid(A z) { return A(1) / (A(1) + exp(-z)); }

// Φ(z), the standard normal distribution.
template <class A> DEVICE A normal_cdf(A z) { return A(0.5) * (A(1) + erf(z * A(0.70710678118654752440))); }

template <Activation ACT, class A> DEVICE A activate(A z) {
  switch (ACT) {
    case Activation::none: return z;
    case Activation::relu: return z <= A(0) ? A(0) : z;
    case Activation::relu6: return z <= A(0) ? A(0) : z >= A(6) ? A(6) : z;
    case Activation::silu: return z / (A(1) + exp(-z));
    case Activation::gelu: return z * normal_cdf(z);
    case Activation::hardswish: {
      const A gate = z + A(3);
      return z * (gate <= A(0) ? A(0) : gate >= A(6) ? A(6) : gate) * A(1. / 6.);
    }
    case Activation::leaky_relu: return z > A(0) ? z : z * A(0.01);
    case Activation::sigmoid: return sigmoid(z);
    case Activation::tanh: return tanh(z);
  }
  return z;
}

// g · act'(z): the gradient of z, from the gradient g of act(z).
template <Activation ACT, class A> DEVICE A activation_grad(A z, A g) {
  switch (ACT) {
    case Activation::none: return g;
    case Activation::relu: return z <= A(0) ? A(0) : g;
    case Activation::relu6: return z <= A(0) || z >= A(6) ? A(0) : g;
    case Activation::silu: {
      const A s = sigmoid(z);
      return g * s * (A(1) + z * (A(1) - s));
    }
    case Activation::gelu: {
      const A density = A(0.39894228040143267794) * exp(A(-0.5) * z * z);  // 1 / sqrt(2π)
      return g * (normal_cdf(z) + z * density);
    }
    case Activation::hardswish: return z <= A(-3) ? A(0) : z < A(3) ? g * (z * A(1. / 3.) + A(0.5)) : g;
    case Activation::leaky_relu: return z > A(0) ? g : g * A(0.01);
    case Activation::sigmoid: {
      const A s = sigmoid(z);
      return g * s * (A(1) - s);
    }
    case Activation::tanh: {
      const A t = tanh(z);
      return g * (A(1) - t * t);
    }
  }
  return g;
}

// The same from y = act(z), where y tells the derivative. Of a y that was rounded to a half type this is the
// derivative at the rounded place, as in PyTorch, which keeps y for most of these, too.
template <Activation ACT>
constexpr bool TOLD_BY_RESULT = ACT == Activation::relu || ACT == Activation::relu6 || ACT == Activation::leaky_relu ||
                                ACT == Activation::sigmoid || ACT == Activation::tanh;
template <Activation ACT, class A> DEVICE A activation_grad_of_result(A y, A g) {
  switch (ACT) {
    case Activation::sigmoid: return g * y * (A(1) - y);
    case Activation::tanh: return g * (A(1) - y * y);
    default: return activation_grad<ACT>(y, g);  // y lies in the piece that z does
  }
}

// ---- on the way to memory ---------------------------------------------------------------------------------
// scale[k] and bias[k] of a channel, either of which may be missing (null): times 1 plus -0 a sum is what it was, to
// the bit, so that one multiply-add does for all.
template <class A> struct ScaleShift {
  A scale, shift;
  template <class P> static __device__ __forceinline__ ScaleShift of(const P* scale, const P* bias, long long k) {
    return {scale ? convert<A>(scale[k]) : A(1), bias ? convert<A>(bias[k]) : A(-0.0)};
  }
  __device__ __forceinline__ A operator()(A sum) const { return fma(sum, scale, shift); }
};

// Writes act(z + residual) for V neighbouring values, `residual` lying as the result does (null: none). What was
// written, before it was rounded, is left in z.
template <Activation ACT, int V, class A, class R, class S>
DEVICE void store_finished(R* y, const S* residual, A (&z)[V]) {
  if (residual) {
    A r[V];
    load_as(r, residual);
#pragma unroll
    for (int i = 0; i < V; i++) z[i] += r[i];
  }
#pragma unroll
  for (int i = 0; i < V; i++) z[i] = activate<ACT>(z[i]);
  store_as(y, z);
}
