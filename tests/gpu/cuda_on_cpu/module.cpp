// The Python module cuda_on_cpu: the LSTM's GPU kernels on the CPU, for tests/gpu/test_cuda_on_cpu.py.
// Tensors come as addresses by name; an address that is missing is null.
#include <stdexcept>
#include <string>
#include <utility>

#include <pybind11/pybind11.h>

#include "run.h"

namespace py = pybind11;
using namespace throughtime;

namespace {

struct Arguments {
  py::dict addresses, numbers;

  template <typename T>
  T* pointer(const char* name) const {
    if (!addresses.contains(name)) return nullptr;
    return reinterpret_cast<T*>(addresses[name].cast<uintptr_t>());
  }
  int64_t number(const char* name) const { return numbers[name].cast<int64_t>(); }
};

RecurrencePlan plan_of(const Arguments& from) {
  RecurrencePlan plan{};
  plan.tier = static_cast<Tier>(from.number("tier"));
  plan.partition.ranks = static_cast<int>(from.number("ranks"));
  plan.partition.units = static_cast<int>(from.number("units"));
  plan.partition.parts = static_cast<int>(from.number("parts"));
  plan.partition.grid = plan.tier == Tier::kGrid;
  plan.tiles_n = static_cast<int>(from.number("tiles_n"));
  plan.held = static_cast<int>(from.number("held"));
  plan.directions = static_cast<int>(from.number("D"));
  plan.partition.groups = static_cast<int>(from.number("groups"));
  plan.threads = static_cast<int>(from.number("threads"));
  plan.shared_bytes = static_cast<int>(from.number("shared_bytes"));
  return plan;
}

template <typename S>
RecurrenceInput<S> input_of(const Arguments& from) {
  RecurrenceInput<S> in{};
  in.T = from.number("T");
  in.B = from.number("B");
  in.D = from.number("D");
  in.H = from.number("H");
  in.weight = from.pointer<S>("weight_hh");
  in.c0 = from.pointer<float>("c_0");
  in.lengths = from.pointer<int64_t>("lengths");
  in.reset = from.pointer<bool>("reset");
  in.reverse = from.number("reverse") != 0;
  return in;
}

template <typename Params>
void start(const Arguments& from, const Params& p) {
  const RecurrencePlan plan = plan_of(from);
  py::gil_scoped_release release;
  if (!run(plan, p)) throw std::runtime_error("no such instance of the kernel");
}

template <typename S>
void forward(const Arguments& from) {
  RecurrenceForward<S> p{};
  p.in = input_of<S>(from);
  p.projected = from.pointer<float>("projected");
  p.bias = from.pointer<float>("bias");
  p.h0 = from.pointer<S>("h_0");
  p.y = from.pointer<S>("output");
  p.h_n = from.pointer<S>("h_n");
  p.c_n = from.pointer<float>("c_n");
  p.gates = from.pointer<SavedGate<S>>("gates");
  p.cells = from.pointer<float>("cells");
  start(from, p);
}

template <typename S>
void backward(const Arguments& from) {
  RecurrenceBackward<S> p{};
  p.in = input_of<S>(from);
  p.gates = from.pointer<SavedGate<S>>("gates");
  p.cells = from.pointer<float>("cells");
  p.dy = from.pointer<S>("grad_output");
  p.dh_n = from.pointer<S>("grad_h_n");
  p.dc_n = from.pointer<float>("grad_c_n");
  p.detach = from.pointer<bool>("detach_mask");
  p.detach_stride_d = from.number("detach_stride_d");
  p.detach_stride_t = from.number("detach_stride_t");
  p.detach_stride_b = from.number("detach_stride_b");
  p.dgates = from.pointer<S>("grad_gates");
  p.dh0 = from.pointer<float>("grad_h_0");
  p.dc0 = from.pointer<float>("grad_c_0");
  start(from, p);
}

void run_dtype(const std::string& dtype, bool is_backward, py::dict addresses, py::dict numbers) {
  const Arguments from{std::move(addresses), std::move(numbers)};
  const auto with = [&](auto scalar) {
    using S = decltype(scalar);
    is_backward ? backward<S>(from) : forward<S>(from);
  };
  if (dtype == "float32") return with(float{});
  if (dtype == "bfloat16") return with(device::BFloat16{});
  if (dtype == "float16") return with(device::Float16{});
  throw std::invalid_argument("dtype " + dtype);
}

// What the backward finds of a gate, r of i, f, g, o, whose sum the forward had.
float saved_gate(const std::string& dtype, int r, float sum) {
  const auto as = [&](auto scalar) {
    using S = decltype(scalar);
    const float saved = cell_forward<S>({sum, sum, sum, sum}, 0, false).saved[r];
    return restored_gate<S>(r, device::to_float(device::from_float<SavedGate<S>>(saved)));
  };
  if (dtype == "float32") return as(float{});
  return dtype == "bfloat16" ? as(device::BFloat16{}) : as(device::Float16{});
}

// plan() of plan.h, with its reason and what it counts.
py::dict make_plan(int64_t T, int64_t B, int64_t D, int64_t H, int scalar_bytes, bool backward,
                   int compute, int multiprocessors, int shared_bytes, int cluster, double ghz,
                   double memory_gbs, int tier) {
  const RecurrenceShape shape{T, B, D, H, scalar_bytes, backward};
  const Gpu gpu{compute, multiprocessors, shared_bytes, cluster, ghz, memory_gbs};
  const RecurrencePlan plan = throughtime::plan(shape, gpu, static_cast<Tier>(tier));
  py::dict found;
  found["tier"] = static_cast<int>(plan.tier);
  found["ranks"] = plan.partition.ranks;
  found["units"] = plan.partition.units;
  found["parts"] = plan.partition.parts;
  found["tiles_n"] = plan.tiles_n;
  found["held"] = plan.held;
  found["groups"] = plan.partition.groups;
  found["threads"] = plan.threads;
  found["shared_bytes"] = plan.shared_bytes;
  found["reason"] = plan.reason ? plan.reason : "";
  found["most_threads"] = most_threads(plan.tiles_n, plan.held);
  found["exists"] = instance_exists(scalar_bytes, backward, plan.tiles_n, plan.held);
  return found;
}

int shared_bytes(bool backward, int H, int units, int ranks, int parts, int warps, bool grid,
                 int tiles_n, int held, int scalar_bytes) {
  return backward
             ? backward_layout(H, units, ranks, parts, warps, grid, tiles_n, held, scalar_bytes)
                   .bytes
             : forward_layout(H, units, parts, grid, tiles_n, held, scalar_bytes).bytes;
}

}  // namespace

// (products, waits for other blocks) since the last call.
std::pair<int64_t, int64_t> take_work() {
  const device::Work done = device::work;
  device::work = {};
  return {done.products, done.waits};
}

PYBIND11_MODULE(cuda_on_cpu, m) {
  m.def("take_work", &take_work);
  m.def("run", &run_dtype);
  m.def("saved_gate", &saved_gate);
  m.def("plan", &make_plan, py::arg("T"), py::arg("B"), py::arg("D"), py::arg("H"),
        py::arg("scalar_bytes"), py::arg("backward"), py::arg("compute"),
        py::arg("multiprocessors"), py::arg("shared_bytes"), py::arg("cluster"),
        py::arg("ghz") = 1.7, py::arg("memory_gbs") = 3350, py::arg("tier") = 0);
  m.def("shared_bytes", &shared_bytes);
}
