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
  in.tf32 = from.number("tf32") != 0;
  return in;
}

template <typename S>
RecurrenceForward<S> forward(const Arguments& from) {
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
  return p;
}

template <typename S>
RecurrenceBackward<S> backward(const Arguments& from) {
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
  return p;
}

template <typename Visit>
auto with_scalar(const std::string& dtype, const Visit& visit) {
  if (dtype == "float32") return visit(float{});
  if (dtype == "bfloat16") return visit(device::BFloat16{});
  if (dtype == "float16") return visit(device::Float16{});
  throw std::invalid_argument("dtype " + dtype);
}

void run_dtype(const std::string& dtype, const RecurrencePlan& plan, bool is_backward,
               py::dict addresses, py::dict numbers) {
  const Arguments from{std::move(addresses), std::move(numbers)};
  const auto start = [&](const auto& p) {
    py::gil_scoped_release release;
    if (!run(plan, p)) throw std::runtime_error("no such instance of the kernel");
  };
  with_scalar(dtype, [&](auto scalar) {
    using S = decltype(scalar);
    is_backward ? start(backward<S>(from)) : start(forward<S>(from));
  });
}

// Gate r of i, f, g, o in the backward, from its sum in the forward.
float saved_gate(const std::string& dtype, int r, float sum) {
  return with_scalar(dtype, [&](auto scalar) {
    using S = decltype(scalar);
    const float saved = cell_forward<S>({sum, sum, sum, sum}, 0, false).saved[r];
    return restored_gate<S>(r, device::to_float(device::from_float<SavedGate<S>>(saved)));
  });
}

RecurrencePlan make_plan(int64_t T, int64_t B, int64_t D, int64_t H, int scalar_bytes,
                         bool backward, int compute, int multiprocessors, int shared_bytes,
                         int cluster, double ghz, double memory_gbs, int tier, bool tf32) {
  return plan({T, B, D, H, scalar_bytes, backward, tf32},
              {compute, multiprocessors, shared_bytes, cluster, ghz, memory_gbs},
              static_cast<Tier>(tier));
}

// A plan by hand: plan() does not divide so few units among several blocks.
RecurrencePlan hand_plan(int64_t T, int64_t B, int64_t D, int64_t H, int scalar_bytes,
                         bool backward, int tier, int ranks, int tiles_n, int held, int parts,
                         int warps) {
  const RecurrenceShape shape{T, B, D, H, scalar_bytes, backward};
  return plan_by_hand(shape, static_cast<Tier>(tier), ranks, tiles_n, held, parts, warps);
}

}  // namespace

// (products, waits for other blocks) since the last call.
std::pair<int64_t, int64_t> take_work() {
  const device::Work done = device::work;
  device::work = {};
  return {done.products, done.waits};
}

PYBIND11_MODULE(cuda_on_cpu, m) {
  const auto of_partition = [](int Partition::* member) {
    return [=](const RecurrencePlan& plan) { return plan.partition.*member; };
  };
  py::class_<RecurrencePlan>(m, "Plan")
      .def_property_readonly("tier",
                             [](const RecurrencePlan& p) { return static_cast<int>(p.tier); })
      .def_property_readonly("reason", [](const RecurrencePlan& p) { return p.reason; })
      .def_property_readonly("groups", of_partition(&Partition::groups))
      .def_property_readonly("ranks", of_partition(&Partition::ranks))
      .def_property_readonly("units", of_partition(&Partition::units))
      .def_property_readonly("parts", of_partition(&Partition::parts))
      .def_readonly("tiles_n", &RecurrencePlan::tiles_n)
      .def_readonly("held", &RecurrencePlan::held)
      .def_readonly("threads", &RecurrencePlan::threads)
      .def_readonly("shared_bytes", &RecurrencePlan::shared_bytes);
  m.def("take_work", &take_work);
  m.def("run", &run_dtype);
  m.def("saved_gate", &saved_gate);
  m.def("most_threads", &most_threads);
  m.def("instance_exists", &instance_exists);
  m.def("tile_mma", &plan_detail::tile_mma);
  m.def("tile_weight_bytes", &plan_detail::tile_weight_bytes);
  m.def("tile_sample_bytes", &plan_detail::tile_sample_bytes);
  m.def("plan", &make_plan, py::arg("T"), py::arg("B"), py::arg("D"), py::arg("H"),
        py::arg("scalar_bytes"), py::arg("backward"), py::arg("compute"),
        py::arg("multiprocessors"), py::arg("shared_bytes"), py::arg("cluster"),
        py::arg("ghz") = 1.7, py::arg("memory_gbs") = 3350, py::arg("tier") = 0,
        py::arg("tf32") = false);
  m.def("hand_plan", &hand_plan, py::arg("T"), py::arg("B"), py::arg("D"), py::arg("H"),
        py::arg("scalar_bytes"), py::arg("backward"), py::arg("tier"), py::arg("ranks") = 1,
        py::arg("tiles_n") = 1, py::arg("held") = 0, py::arg("parts") = 1, py::arg("warps") = 0);
}
