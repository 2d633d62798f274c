// throughtime::lstm_recurrence_forward and _backward on GPUs: check, plan, run. Also the Python module
// throughtime._C_cuda, whose import registers them. Limited API and stable ABI, as binding.cpp.
//
// What the arguments mean: python/throughtime/ops/lstm/recurrence.py.
#include <Python.h>

#include <array>
#include <cstdlib>
#include <map>
#include <mutex>
#include <tuple>
#include <vector>

#include <torch/csrc/stable/accelerator.h>

#include "common/operator.h"
#include "common/sizes.h"
#include "lstm/cuda/gpu.h"
#include "lstm/cuda/launch.h"

namespace throughtime {
namespace {

using device::BFloat16;
using device::Float16;

struct ForwardCall {
  Tensor projected;
  Maybe bias;
  Tensor h_0, c_0, weight_hh;
  Maybe lengths, reset;
  bool reverse, save, tf32;
};

struct BackwardCall {
  Maybe grad_output, grad_h_n, grad_c_n;
  Tensor c_0, weight_hh, gates, cells;
  Maybe lengths, reset, detach_mask;
  bool reverse, tf32;
};

// THROUGHTIME_CUDA_TIER: for tests and benchmarks, which want to see every tier on one GPU.
Tier wanted_tier() {
  const char* name = std::getenv("THROUGHTIME_CUDA_TIER");
  Tier tier = Tier::kNone;
  STD_TORCH_CHECK(tier_named(name ? name : "", &tier),
                  "THROUGHTIME_CUDA_TIER should be resident, grid or stepwise, got '", name, "'");
  return tier;
}

// plan() for a GPU here, made once per shape.
RecurrencePlan planned(RecurrenceShape shape, int device) {
  static std::mutex mutex;
  static std::map<std::tuple<int, Tier, int64_t, int64_t, int64_t, int, bool, bool>, RecurrencePlan>
      known;
  const Tier only = wanted_tier();
  const auto key = std::make_tuple(device, only, shape.B, shape.D, shape.H, shape.scalar_bytes,
                                   shape.backward, shape.tf32);
  const std::lock_guard<std::mutex> lock(mutex);
  auto found = known.find(key);
  if (found == known.end()) {
    found = known.emplace(key, plan_where_room(shape, gpu_of(device), only, has_room)).first;
  }
  TT_CHECK_CALL(found->second.tier != Tier::kNone, "[T, B, D, H] = [", shape.T, ", ", shape.B, ", ",
                shape.D, ", ", shape.H, "] does not run on ", name_of(device), ": ",
                found->second.reason, "; use backend='triton' or 'reference'");
  return found->second;
}

cudaStream_t current_stream(int device) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  return static_cast<cudaStream_t>(stream);
}

// Dense, and where the kernels' wide loads may begin.
Tensor aligned(const Tensor& tensor) {
  const Tensor whole = dense(tensor);
  const bool fits = reinterpret_cast<uintptr_t>(whole.const_data_ptr()) % 16 == 0;
  return fits ? whole : torch::stable::clone(whole);
}
OptionalTensor aligned(const OptionalTensor& tensor) {
  return tensor ? OptionalTensor(aligned(*tensor)) : std::nullopt;
}

// product = a b in float, by torch, which honours its own switches for TF32.
void multiply_into(Tensor product, const Tensor& a, const Tensor& b) {
  using torch::stable::detail::from;
  if (a.scalar_type() == ScalarType::Float) {
    std::array<StableIValue, 3> stack{from(a), from(b), from(product)};
    TORCH_ERROR_CODE_CHECK(
        torch_call_dispatcher("aten::mm", "out", stack.data(), TORCH_ABI_VERSION));
    torch::stable::detail::to<Tensor>(stack[0]);  // takes the reference that was returned
    return;
  }
  std::array<StableIValue, 4> stack{from(a), from(b), from(ScalarType::Float), from(product)};
  TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::mm", "dtype_out", stack.data(), TORCH_ABI_VERSION));
  torch::stable::detail::to<Tensor>(stack[0]);
}

Tensor at(const Tensor& tensor, int64_t index) { return torch::stable::select(tensor, 0, index); }

// What both passes take, dense and checked.
struct Common {
  RecurrenceShape shape;
  int device;
  ScalarType dtype;
  Tensor c_0, weight_hh;
  OptionalTensor lengths, reset;
  bool reverse;

  template <typename Call>
  Common(const Call& call, int64_t T, int64_t B, bool backward)
      : device(call.weight_hh.get_device()),
        dtype(call.weight_hh.scalar_type()),
        reverse(call.reverse) {
    TT_CHECK_CALL(call.weight_hh.is_cuda(), "weight_hh should be on a GPU, as the others are");
    check_dims("weight_hh", call.weight_hh, "[D, 4H, H]");
    TT_CHECK_CALL(
        dtype == ScalarType::Float || dtype == ScalarType::BFloat16 || dtype == ScalarType::Half,
        "weight_hh should be float32, bfloat16 or float16, got ",
        torch::headeronly::toString(dtype));
    const int64_t D = call.weight_hh.size(0), H = call.weight_hh.size(2);
    shape = {T, B, D, H, dtype == ScalarType::Float ? 4 : 2, backward, call.tf32};
    check("weight_hh", call.weight_hh, {D, times(4, H), H}, dtype);
    TT_CHECK_CALL(D > 0 && H > 0,
                  "weight_hh should be [D, 4H, H] of at least one direction and unit");
    check("c_0", call.c_0, {D, B, H}, ScalarType::Float);
    check("lengths", call.lengths, {B}, ScalarType::Long);
    check("reset", call.reset, {D, T, B}, ScalarType::Bool);
    // One of another shape may be as large as `expand` makes it: copied only now.
    c_0 = dense(call.c_0);
    weight_hh = aligned(call.weight_hh);
    lengths = dense(call.lengths);
    reset = dense(call.reset);
  }

  void check(const char* argument, const Tensor& tensor, std::initializer_list<int64_t> sizes,
             ScalarType wanted) const {
    TT_CHECK_CALL(tensor.is_cuda() && tensor.get_device() == device, argument,
                  " should be on cuda:", device, ", as the others are");
    check_shape(argument, tensor, sizes);
    check_dtype(argument, tensor, wanted);
  }
  void check(const char* argument, const OptionalTensor& tensor,
             std::initializer_list<int64_t> sizes, ScalarType wanted) const {
    if (tensor) check(argument, *tensor, sizes, wanted);
  }

  ScalarType saved_gates() const {
    return dtype == ScalarType::Float ? ScalarType::Float : ScalarType::Half;
  }

  Tensor unset(std::initializer_list<int64_t> sizes, ScalarType of) const {
    return torch::stable::new_empty(
        weight_hh, torch::headeronly::IntHeaderOnlyArrayRef(sizes.begin(), sizes.size()), of);
  }

  template <typename S>
  RecurrenceInput<S> as() const {
    return {shape.T,
            shape.B,
            shape.D,
            shape.H,
            data<S>(weight_hh),
            data<float>(c_0),
            data<int64_t>(lengths),
            data<bool>(reset),
            reverse,
            shape.tf32,
            {}};
  }

  // visit(S{}) for the type of the numbers.
  template <typename Visit>
  void with_scalar(const Visit& visit) const {
    if (dtype == ScalarType::Float) return visit(float{});
    if (dtype == ScalarType::BFloat16) return visit(BFloat16{});
    visit(Float16{});
  }

  // Whether all steps ran in one launch; the stepwise tier needs no room for many blocks at once.
  template <typename Params>
  bool ran_persistent(const RecurrencePlan& plan, const Params& p) const {
    if (plan.tier == Tier::kStepwise) return false;
    const int64_t bytes = workspace_bytes(plan, shape);
    const Tensor workspace = unset({bytes}, ScalarType::Byte);
    const bool ran = run_persistent(plan, p, bytes > 0 ? mutable_data<char>(workspace) : nullptr,
                                    current_stream(device));
    STD_TORCH_CHECK(ran || wanted_tier() == Tier::kNone,
                    "THROUGHTIME_CUDA_TIER=", tier_name(plan.tier), ": ", name_of(device),
                    " has no room for ", plan.blocks(), " blocks of ", plan.threads,
                    " threads at once: unset it, or take away what "
                    "keeps this process from the whole GPU");
    return ran;
  }
};

using ForwardResult = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

template <typename S>
void forward_as(const RecurrencePlan& plan, const Common& common, const Tensor& projected,
                const OptionalTensor& bias, const Tensor& h_0, const ForwardResult& result,
                bool save) {
  const auto& [output, h_n, c_n, gates, cells] = result;
  const RecurrenceForward<S> p{common.as<S>(),
                               data<float>(projected),
                               data<float>(bias),
                               data<S>(h_0),
                               mutable_data<S>(output),
                               mutable_data<S>(h_n),
                               mutable_data<float>(c_n),
                               save ? mutable_data<SavedGate<S>>(gates) : nullptr,
                               save ? mutable_data<float>(cells) : nullptr};
  if (common.ran_persistent(plan, p)) return;

  torch::stable::copy_(const_cast<Tensor&>(h_n), h_0);
  torch::stable::copy_(const_cast<Tensor&>(c_n), common.c_0);
  const RecurrenceShape& s = common.shape;
  const Tensor product = common.unset({s.D, s.B, 4 * s.H}, ScalarType::Float);
  std::vector<Tensor> h, weight, to;
  for (int64_t d = 0; d < s.D; ++d) {
    h.push_back(at(h_n, d));
    weight.push_back(torch::stable::transpose(at(common.weight_hh, d), 0, 1));
    to.push_back(at(product, d));
  }
  run_stepwise<S>(
      p, mutable_data<float>(product),
      [&](int64_t d, float*) { multiply_into(to[d], h[d], weight[d]); },
      current_stream(common.device));
}

ForwardResult forward(ForwardCall& call) {
  running_operator = "lstm_recurrence_forward";
  check_dims("projected", call.projected, "[T, B, D, 4H]");
  const Common common(call, call.projected.size(0), call.projected.size(1), false);
  const RecurrenceShape& s = common.shape;
  common.check("projected", call.projected, {s.T, s.B, s.D, 4 * s.H}, ScalarType::Float);
  common.check("h_0", call.h_0, {s.D, s.B, s.H}, common.dtype);
  common.check("bias", call.bias, {s.D, 4 * s.H}, ScalarType::Float);
  const Tensor projected = dense(call.projected), h_0 = dense(call.h_0);
  const OptionalTensor bias = dense(call.bias);

  const torch::stable::accelerator::DeviceGuard guard(common.device);
  const int64_t steps = call.save ? s.T : 0;
  const ForwardResult result{common.unset({s.T, s.B, s.D, s.H}, common.dtype),
                             common.unset({s.D, s.B, s.H}, common.dtype),
                             common.unset({s.D, s.B, s.H}, ScalarType::Float),
                             common.unset({steps, s.B, s.D, 4 * s.H}, common.saved_gates()),
                             common.unset({steps, s.B, s.D, s.H}, ScalarType::Float)};
  if (s.B == 0) return result;
  const RecurrencePlan plan = planned(s, common.device);
  common.with_scalar([&](auto scalar) {
    forward_as<decltype(scalar)>(plan, common, projected, bias, h_0, result, call.save);
  });
  return result;
}

struct Gradients {
  OptionalTensor output, h_n, c_n, detach_mask;
  Tensor gates, cells;
};

// [D, T] on the host: whether some sample lets a gradient through. True everywhere while a graph is
// recorded, which must not depend on one mask.
class Flows {
 public:
  Flows(const OptionalTensor& mask, int64_t T, cudaStream_t stream) : T_(T) {
    if (!mask || is_capturing(stream)) return;
    // Samples that share their mask have one row.
    const bool shared = mask->stride(2) == 0;
    const Tensor rows = dense(shared ? torch::stable::select(*mask, 2, 0) : *mask);
    B_ = shared ? 1 : mask->size(2);
    detached_.resize(rows.numel());
    copy_to_host(detached_.data(), rows.const_data_ptr(), detached_.size(), stream);
  }
  bool operator()(int64_t d, int64_t t) const {
    if (detached_.empty()) return true;
    for (int64_t n = 0; n < B_; ++n) {
      if (!detached_[(d * T_ + t) * B_ + n]) return true;
    }
    return false;
  }

 private:
  int64_t T_, B_ = 0;
  std::vector<char> detached_;
};

using BackwardResult = std::tuple<Tensor, Tensor, Tensor>;

template <typename S>
void backward_as(const RecurrencePlan& plan, const Common& common, const Gradients& grad,
                 const BackwardResult& result) {
  const auto& [dgates, dh0, dc0] = result;
  const OptionalTensor& mask = grad.detach_mask;
  const RecurrenceBackward<S> p{common.as<S>(),
                                data<SavedGate<S>>(grad.gates),
                                data<float>(grad.cells),
                                data<S>(grad.output),
                                data<S>(grad.h_n),
                                data<float>(grad.c_n),
                                data<bool>(mask),
                                mask ? mask->stride(0) : 0,
                                mask ? mask->stride(1) : 0,
                                mask ? mask->stride(2) : 0,
                                mutable_data<S>(dgates),
                                mutable_data<float>(dh0),
                                mutable_data<float>(dc0)};
  if (common.ran_persistent(plan, p)) return;

  const auto start = [](const Tensor& state, const OptionalTensor& from) {
    if (from) {
      torch::stable::copy_(const_cast<Tensor&>(state), *from);
    } else {
      fill_zero(state);
    }
  };
  start(dh0, grad.h_n);
  start(dc0, grad.c_n);
  const RecurrenceShape& s = common.shape;
  const cudaStream_t stream = current_stream(common.device);
  const Tensor product = common.unset({s.D, s.B, s.H}, ScalarType::Float);
  run_stepwise<S>(
      p, mutable_data<float>(product), Flows(mask, s.T, stream),
      [&](int64_t d, int64_t t, float*) {
        const Tensor da = torch::stable::select(at(dgates, t), 1, d);
        multiply_into(at(product, d), da, at(common.weight_hh, d));
      },
      stream);
}

BackwardResult backward(BackwardCall& call) {
  running_operator = "lstm_recurrence_backward";
  check_dims("gates", call.gates, "[T, B, D, 4H]");
  const Common common(call, call.gates.size(0), call.gates.size(1), true);
  const RecurrenceShape& s = common.shape;
  common.check("gates", call.gates, {s.T, s.B, s.D, 4 * s.H}, common.saved_gates());
  common.check("cells", call.cells, {s.T, s.B, s.D, s.H}, ScalarType::Float);
  common.check("grad_output", call.grad_output, {s.T, s.B, s.D, s.H}, common.dtype);
  common.check("grad_h_n", call.grad_h_n, {s.D, s.B, s.H}, common.dtype);
  common.check("grad_c_n", call.grad_c_n, {s.D, s.B, s.H}, ScalarType::Float);
  common.check("detach_mask", call.detach_mask, {s.D, s.T, s.B}, ScalarType::Bool);
  const Gradients grad{aligned(call.grad_output), dense(call.grad_h_n), dense(call.grad_c_n),
                       call.detach_mask,          aligned(call.gates),  dense(call.cells)};

  const torch::stable::accelerator::DeviceGuard guard(common.device);
  const BackwardResult result{common.unset({s.T, s.B, s.D, 4 * s.H}, common.dtype),
                              common.unset({s.D, s.B, s.H}, ScalarType::Float),
                              common.unset({s.D, s.B, s.H}, ScalarType::Float)};
  if (s.B == 0) return result;
  const RecurrencePlan plan = planned(s, common.device);
  common.with_scalar(
      [&](auto scalar) { backward_as<decltype(scalar)>(plan, common, grad, result); });
  return result;
}

// ---- Python ----
// Runs what may throw; its words become a RuntimeError.
template <typename Make>
PyObject* guarded(const Make& make) {
  try {
    return make();
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
    return nullptr;
  }
}

PyObject* py_why_not(PyObject*, PyObject* args) {
  int device;
  if (!PyArg_ParseTuple(args, "i", &device)) return nullptr;
  return guarded([&]() -> PyObject* {
    const torch::stable::accelerator::DeviceGuard guard(device);
    const std::string reason = why_not(device);
    if (reason.empty()) Py_RETURN_NONE;
    return PyUnicode_FromString(reason.c_str());
  });
}

PyObject* py_gpu(PyObject*, PyObject* args) {
  int device;
  if (!PyArg_ParseTuple(args, "i", &device)) return nullptr;
  return guarded([&]() -> PyObject* {
    const torch::stable::accelerator::DeviceGuard guard(device);
    const Gpu& gpu = gpu_of(device);
    return Py_BuildValue("(iiiidd)", gpu.compute, gpu.multiprocessors, gpu.shared_bytes,
                         gpu.cluster, gpu.ghz, gpu.memory_gbs);
  });
}

PyMethodDef methods[] = {
    {"why_not", py_why_not, METH_VARARGS,
     "why_not(device): None, or why the kernels do not run on that GPU."},
    {"gpu", py_gpu, METH_VARARGS,
     "gpu(device): (compute, multiprocessors, shared_bytes, cluster, ghz, memory_gbs)."},
    {nullptr, nullptr, 0, nullptr}};

PyModuleDef module = {PyModuleDef_HEAD_INIT,
                      "_C_cuda",
                      "throughtime's kernels for NVIDIA GPUs.",
                      -1,
                      methods,
                      nullptr,
                      nullptr,
                      nullptr,
                      nullptr};

}  // namespace
}  // namespace throughtime

STABLE_TORCH_LIBRARY_IMPL(throughtime, CUDA, library) {
  library.impl("lstm_recurrence_forward", &throughtime::boxed<throughtime::forward>);
  library.impl("lstm_recurrence_backward", &throughtime::boxed<throughtime::backward>);
}

PyMODINIT_FUNC PyInit__C_cuda(void) { return PyModule_Create(&throughtime::module); }
