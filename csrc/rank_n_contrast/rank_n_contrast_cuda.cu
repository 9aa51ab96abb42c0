// Rank-N-Contrast on CUDA: scratch memory and launches, in strips of anchors so that no N × N matrix exists.
#include <algorithm>

#include "core/round.h"
#include "cuda/scratch.cuh"
#include "rank_n_contrast/rank_n_contrast.h"
#include "rank_n_contrast/rank_n_contrast_scan.cuh"

namespace msacore::rank_n_contrast::cuda {
namespace {

#ifndef MSACORE_SMALL_SIZES
constexpr int64_t kStripBytes = int64_t{256} << 20;
#else
constexpr int64_t kStripBytes = 64 << 10;  // small, so that even small inputs take several strips
#endif

unsigned tiles(int64_t count) { return static_cast<unsigned>(ceil_div(count, kTile)); }

// The samples in order, and memory for a strip of anchors. Distances have one of two types A, float32 and float64; the
// device chooses one of them, and they share their memory.
template <typename T>
struct Pass {
  const char* op;
  const Problem& problem;
  cudaStream_t stream;
  bool is_space;
  Ranked<T> ranked;
  int64_t from, to, strip;  // anchors, in whole tiles
  Near near;
  void* target;
  double *rows, *square, *distances, *offsets, *numbers, *losses, *sums;
  Order order;
  Scratch scratch;

  Pass(const char* op, const Problem& problem, bool backward, cudaStream_t stream)
      : op(op),
        problem(problem),
        stream(stream),
        is_space(problem.labels != 1),
        ranked(ranked_of(problem)),
        from(problem.anchor_begin / kTile * kTile),
        to(round_up(problem.anchor_end, kTile)),
        strip(strip_of(ranked, to - from)),
        near(near_of(ranked.padded, strip)),
        order{nullptr, nullptr, ranked.padded},
        scratch(problem.embeddings, [&](Scratch& memory) {
          memory.take(ranked.sample, ranked.count);
          memory.take(ranked.norm, ranked.count);
          memory.take(ranked.mean, ranked.d);
          memory.take(ranked.state, 1);
          int64_t* eight_bytes = nullptr;
          memory.take(eight_bytes, is_space ? 0 : ranked.count);
          target = eight_bytes;
          const int64_t elements = ranked.padded * pool<double>().width;  // as wide as those of float32, or wider
          memory.take(rows, elements);
          memory.take(square, ranked.padded);
          memory.take(distances, strip * ranked.padded);
          memory.take(offsets, strip * ranked.padded);
          memory.take(numbers, strip * ranked.padded * 4);
          memory.take(losses, to - from);
          memory.take(sums, backward ? elements : 0);
          memory.take(order.place, strip * ranked.padded);
          memory.take(order.group, strip * ranked.padded);
          memory.take(near.by_anchor, strip * near.samples);
          memory.take(near.by_sample, ranked.padded * near.anchors);
        }) {
    with_targets([&](auto tag) {
      using Target = typename decltype(tag)::type;
      launch(rank_kernel<Target>, grid_for(ranked.count, kThreads), dim3(kThreads), 0, stream,
             is_space ? nullptr : problem.targets.template const_data_ptr<Target>(), data_or_null<bool>(problem.mask),
             ranked.count, ranked.sample, ranked.state, static_cast<Value<Target>*>(target));
    });
    for (const bool last : {false, true}) {
      launch(norm_kernel<T>, grid_for(ranked.count, kWarps), dim3(kThreads), 0, stream, ranked);
      launch(median_kernel, dim3(1), dim3(kMedianThreads), 0, stream, ranked.norm, ranked.state, last,
             data_or_null<double>(problem.learned_temperature), problem.temperature, std::is_same_v<T, double>);
    }
    launch(embedding_mean_kernel<T>, dim3(static_cast<unsigned>(ceil_div(ranked.d, kWarp))), dim3(kMeanThreads), 0,
           stream, ranked);
    with_types([&](auto tag) {
      using A = typename decltype(tag)::type;
      launch(rows_kernel<T, A>, grid_for(ranked.padded, kWarps), dim3(kThreads), 0, stream, pool<A>());
    });
  }

  static Ranked<T> ranked_of(const Problem& problem) {
    Ranked<T> ranked{};
    ranked.embeddings = problem.embeddings.template const_data_ptr<T>();
    ranked.count = problem.samples;
    ranked.padded = int64_t{tiles(problem.samples)} * kTile;
    ranked.d = problem.width;
    return ranked;
  }

  static Near near_of(int64_t samples, int64_t anchors) {
    Near near{};
    near.samples = samples / kWordBits;
    near.anchors = anchors / kWordBits;
    return near;
  }

  static int64_t strip_of(const Ranked<T>& ranked, int64_t anchors) {
    const int64_t bytes_per_tile = ranked.padded * kTile * 7 * static_cast<int64_t>(sizeof(double));
    return std::min(anchors, kTile * std::max<int64_t>(1, kStripBytes / bytes_per_tile));
  }

  template <typename A>
  Pool<T, A> pool() const {
    const int64_t depth = round_up(ranked.d, kPer16<A>);
    return {ranked, depth, depth + kPer16<A>, reinterpret_cast<A*>(rows), reinterpret_cast<A*>(square)};
  }

  // Calls body(tag) with the type of the targets.
  template <typename Body>
  void with_targets(Body&& body) const {
    if (problem.targets.scalar_type() == ScalarType::Long) return body(TypeTag<int64_t>{});
    dispatch_floating(problem.targets.scalar_type(), op, body);
  }

  // Calls body(tag) with each type that distances may have.
  template <typename Body>
  static void with_types(Body&& body) {
    if constexpr (!std::is_same_v<T, double>) body(TypeTag<float>{});
    body(TypeTag<double>{});
  }

  // Calls body(first, anchors) for every strip.
  template <typename Body>
  void for_strips(Body&& body) const {
    for (int64_t first = from; first < to; first += strip) body(first, std::min(strip, to - first));
  }

  // The anchors of a strip: their losses or, with `Backward`, factors.
  template <bool Backward, typename A>
  void anchors(int64_t first, int64_t size, const double* grad_out) const {
    launch(distance_kernel<T, A>, dim3(tiles(ranked.padded), tiles(size)), dim3(kTileThreads),
           kTileBytes<A, A, A, true, true>, stream, pool<A>(), first, reinterpret_cast<A*>(distances), offsets, near);
    const Strip<A> of_anchors{first,
                              problem.anchor_begin,
                              problem.anchor_end,
                              ranked.padded,
                              reinterpret_cast<A*>(distances),
                              offsets,
                              numbers,
                              order,
                              near};
    launch(anchor_kernel<Backward, A>, dim3(static_cast<unsigned>(size)), dim3(kThreads), 0, stream, ranked.state,
           ranked.norm, of_anchors, grad_out, losses - from);
  }

  // Finds the order in which each anchor of a strip sees the others. Gaps of several labels lie in the memory where
  // `anchors` later puts numbers.
  void sort(int64_t first, int64_t size) const {
    with_targets([&](auto tag) {
      using Target = typename decltype(tag)::type;
      using Sum = typename LabelTypes<Target>::SumOfGaps;
      static_assert(sizeof(Sum) <= 4 * sizeof(double), "gaps must fit where numbers will lie");
      const dim3 grid(static_cast<unsigned>(size));
      if (is_space)
        launch(space_order_kernel<Target>, grid, dim3(kThreads), 0, stream,
               problem.targets.template const_data_ptr<Target>(), problem.labels, ranked.sample, ranked.state, first,
               reinterpret_cast<Sum*>(numbers), order);
      else
        launch(line_order_kernel<Target>, grid, dim3(kThreads), 0, stream, static_cast<const Value<Target>*>(target),
               ranked.state, first, order);
    });
  }

  // Adds the pull of a strip's factors to `sums`.
  template <typename A>
  void pull(int64_t first, int64_t size) const {
    const Pool<T, A> p = pool<A>();
    A *const factors = reinterpret_cast<A*>(distances), *const to_sums = reinterpret_cast<A*>(sums);
    const auto grid = [&](int64_t samples) { return dim3(tiles(p.width), tiles(samples)); };
    launch(pull_kernel<false, A>, grid(ranked.padded), dim3(kTileThreads), kTileBytes<A, A, A, false, false>, stream,
           ranked.state, p.rows, p.width, factors, ranked.padded, 0, first, size, first > from, to_sums);
    launch(pull_kernel<true, A>, grid(size), dim3(kTileThreads), kTileBytes<A, A, A, true, false>, stream, ranked.state,
           p.rows, p.width, factors, ranked.padded, first, 0, ranked.padded, true, to_sums);
    launch(near_kernel<T, A>, grid_for(ranked.count * kWarp, kThreads), dim3(kThreads), 0, stream, p, near, first, size,
           numbers + ranked.padded, 4 * ranked.padded, to_sums);
  }
};

void forward(const char* op, const Problem& problem, Tensor& out) {
  const OnDeviceOf device(problem.embeddings);
  dispatch_floating(problem.embeddings.scalar_type(), op, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const Pass<T> pass(op, problem, false, device.stream);
    pass.for_strips([&](int64_t first, int64_t size) {
      pass.sort(first, size);
      Pass<T>::with_types([&](auto type) {
        using A = typename decltype(type)::type;
        pass.template anchors<false, A>(first, size, nullptr);
      });
    });
    launch(loss_kernel<acc_t<T>>, dim3(1), dim3(kThreads), 0, device.stream, pass.losses, pass.to - pass.from,
           pass.ranked.state, out.mutable_data_ptr<acc_t<T>>());
  });
}

void backward(const char* op, const Problem& problem, const Tensor& grad_out, Tensor& grad_embeddings,
              Tensor& grad_temperature) {
  const OnDeviceOf device(problem.embeddings);
  dispatch_floating(problem.embeddings.scalar_type(), op, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const Pass<T> pass(op, problem, true, device.stream);
    const double* g = grad_out.const_data_ptr<double>();
    pass.for_strips([&](int64_t first, int64_t size) {
      pass.sort(first, size);
      Pass<T>::with_types([&](auto type) {
        using A = typename decltype(type)::type;
        pass.template anchors<true, A>(first, size, g);
        pass.template pull<A>(first, size);
      });
    });
    Pass<T>::with_types([&](auto type) {
      using A = typename decltype(type)::type;
      launch(scatter_kernel<T, A>, grid_for(problem.samples, kWarps), dim3(kThreads), 0, device.stream,
             pass.template pool<A>(), reinterpret_cast<const A*>(pass.sums), grad_embeddings.mutable_data_ptr<T>());
    });
    if (problem.learned_temperature)
      launch(temperature_kernel, dim3(1), dim3(kThreads), 0, device.stream, pass.losses, pass.to - pass.from,
             pass.ranked.state, g, grad_temperature.mutable_data_ptr<double>());
  });
}

using Operators = RankOperators<forward, backward>;

}  // namespace
}  // namespace msacore::rank_n_contrast::cuda

MSACORE_CUDA_LIBRARY(m) {
  m.impl("rank_n_contrast", TORCH_BOX(&msacore::rank_n_contrast::cuda::Operators::rank_n_contrast));
  m.impl("rank_n_contrast_backward", TORCH_BOX(&msacore::rank_n_contrast::cuda::Operators::rank_n_contrast_backward));
}
