// The Python module throughtime._C: importing it registers the operators' implementations (each
// op's own file does so); its functions are for inspection and tests. Limited API: one binary for
// every Python from 3.10 on.
#include <Python.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <initializer_list>

#include "common/cpu/call.h"
#include "common/cpu/cpus.h"
#include "common/cpu/isa.h"
#include "common/cpu/pool.h"
#include "common/cpu/precision.h"
#include "lstm/cpu/kernels.h"
#include "lstm/cuda/plan.h"
#include "recurrence/cpu/plan.h"
#include "rel_lstm/cpu/plan.h"
#include "relevancy/cpu/plan.h"

namespace {

using namespace throughtime;

PyObject* name_of_isa(PyObject*, PyObject*) { return PyUnicode_FromString(isa().name); }

PyObject* runnable_isas(PyObject*, PyObject*) {
  PyObject* names = PyList_New(0);
  for (const Isa* isa = isas(); names && isa->name; ++isa) {
    if (!isa->runs_here) continue;
    PyObject* name = PyUnicode_FromString(isa->name);
    if (!name || PyList_Append(names, name) < 0) Py_CLEAR(names);
    Py_XDECREF(name);
  }
  return names;
}

PyObject* set_isa(PyObject*, PyObject* args) {
  const char* name = nullptr;
  if (!PyArg_ParseTuple(args, "s", &name)) return nullptr;
  if (!choose_isa(name)) {
    PyErr_Format(PyExc_ValueError, "isa should be one of runnable_isas(), got '%s'", name);
    return nullptr;
  }
  Py_RETURN_NONE;
}

PyObject* empty_cache(PyObject*, PyObject*) {
  pool_empty();
  Py_RETURN_NONE;
}

PyObject* cache_statistics(PyObject*, PyObject*) {
  const PoolStatistics s = pool_statistics();
  return Py_BuildValue("{s:n,s:n,s:n}", "used_bytes", static_cast<Py_ssize_t>(s.used_bytes),
                       "idle_bytes", static_cast<Py_ssize_t>(s.idle_bytes), "peak_used_bytes",
                       static_cast<Py_ssize_t>(s.peak_used_bytes));
}

// Plans divide by sizes.
bool are_sizes(std::initializer_list<Py_ssize_t> sizes) {
  const bool right = std::all_of(sizes.begin(), sizes.end(),
                                 [](Py_ssize_t size) { return size >= 1 && size < kTooMany; });
  if (!right) PyErr_SetString(PyExc_ValueError, "sizes should be at least 1 and below 2^53");
  return right;
}

PyObject* workers(PyObject*, PyObject*) {
  const Cpus found = cpus();
  return Py_BuildValue("{s:i,s:i,s:d,s:i}", "workers", cpu_runtime().threads, "affinity",
                       found.affinity, "quota", found.quota, "taken", found.taken);
}

PyObject* pretend_cpus_are(PyObject*, PyObject* args) {
  int count;
  if (!PyArg_ParseTuple(args, "i", &count)) return nullptr;
  pretend_cpus(count);
  Py_RETURN_NONE;
}

PyObject* quota_below(PyObject*, PyObject* args) {
  const char* root = nullptr;
  if (!PyArg_ParseTuple(args, "s", &root)) return nullptr;
  return PyFloat_FromDouble(cgroup_quota(root));
}

// [[begin, end], ...] of share(0) ... share(count - 1).
template <typename F>
PyObject* shares(int64_t count, const F& share) {
  PyObject* list = PyList_New(0);
  for (int64_t i = 0; list && i < count; ++i) {
    const Share own = share(i);
    PyObject* pair =
        Py_BuildValue("nn", static_cast<Py_ssize_t>(own.begin), static_cast<Py_ssize_t>(own.end));
    if (!pair || PyList_Append(list, pair) < 0) Py_CLEAR(list);
    Py_XDECREF(pair);
  }
  return list;
}

// Which rows and blocks of units the members of the teams have, whose panels have `width` blocks.
PyObject* partition(int64_t batch, int64_t groups, int64_t chunk, const WalkSchedule& schedule,
                    int64_t blocks, int64_t width) {
  return Py_BuildValue("{s:N,s:i,s:N,s:n}", "rows",
                       shares(groups, [&](int64_t group) { return Share(batch, group, groups); }),
                       "teams", schedule.teams, "blocks",
                       shares(schedule.members,
                              [&](int64_t member) {
                                return member_blocks(blocks, width, member, member + 1,
                                                     schedule.members);
                              }),
                       "chunk", static_cast<Py_ssize_t>(chunk));
}

PyObject* lstm_plan(PyObject*, PyObject* args) {
  Py_ssize_t T, B, I, H, R, scalar_bytes;
  int threads, unit = 0;
  if (!PyArg_ParseTuple(args, "nnnnnni|p", &T, &B, &I, &H, &R, &scalar_bytes, &threads, &unit))
    return nullptr;
  if (!are_sizes({T, B, I, H, R, scalar_bytes})) return nullptr;
  const LstmShape shape{T, B, I, H, R};
  const int64_t sum_bytes = scalar_bytes == sizeof(double) ? sizeof(double) : sizeof(float);
  const int64_t lanes = lstm_kernels().vector_bytes / sum_bytes;
  const int64_t blocks = divide_up(H, lanes);
  const WalkPlan forward = plan_forward(shape, kLstmGates, scalar_bytes, unit, threads, lanes);
  const WalkPlan backward = plan_walk(shape, kLstmGates, scalar_bytes, unit);
  const auto pass = [&](const WalkPlan& plan, bool panels) {
    const WalkSchedule schedule = schedule_walk(shape, kLstmGates, plan, threads, lanes);
    return partition(B, plan.groups, plan.chunk, schedule, blocks,
                     panels ? panel_width(blocks, schedule.members) : 1);
  };
  return Py_BuildValue("{s:n,s:N,s:N}", "lanes", static_cast<Py_ssize_t>(lanes), "forward",
                       pass(forward, false), "backward", pass(backward, true));
}

PyObject* parts_of_float32(PyObject*, PyObject* args) {
  Py_ssize_t T, B, I, H, R;
  if (!PyArg_ParseTuple(args, "nnnnn", &T, &B, &I, &H, &R)) return nullptr;
  return PyLong_FromLong(float32_parts(LstmShape{T, B, I, H, R}));
}

PyObject* parts_asked(PyObject*, PyObject*) { return PyLong_FromLong(float32_parts_asked()); }

PyObject* rel_lstm_plan(PyObject*, PyObject* args) {
  Py_ssize_t T, B, I, H, A, scalar_bytes;
  int threads;
  if (!PyArg_ParseTuple(args, "nnnnnni", &T, &B, &I, &H, &A, &scalar_bytes, &threads))
    return nullptr;
  if (!are_sizes({T, B, I, H, A, scalar_bytes})) return nullptr;
  const RelLstmShape shape{B, I, H, A, {.T = T}};
  const int64_t sum_bytes = scalar_bytes == sizeof(double) ? sizeof(double) : sizeof(float);
  const int64_t lanes = lstm_kernels().vector_bytes / sum_bytes, blocks = shape.units() / lanes;
  const auto pass = [&](const RelLstmPlan& plan, bool panels) {
    const WalkSchedule schedule = schedule_rel_lstm(shape, plan, threads, lanes);
    return partition(B, plan.groups, T, schedule, blocks,
                     panels ? panel_width(blocks, schedule.members) : 1);
  };
  return Py_BuildValue("{s:n,s:N,s:N}", "lanes", static_cast<Py_ssize_t>(lanes), "forward",
                       pass(plan_rel_lstm_forward(shape, scalar_bytes, threads), false), "backward",
                       pass(plan_rel_lstm(shape, scalar_bytes), true));
}

PyObject* relevancy_plan(PyObject*, PyObject* args) {
  Py_ssize_t sequences, T, D, attended;
  int threads, shares;
  if (!PyArg_ParseTuple(args, "nnnnip", &sequences, &T, &D, &attended, &threads, &shares))
    return nullptr;
  if (!are_sizes({sequences, T, D, attended})) return nullptr;
  const RelevancyShape shape{
      sequences, 1, D, D, {.T = T, .P = 0, .R = 0, .window_size = attended, .top_k = 0}};
  PyObject* list = PyList_New(0);
  for (const SequencePart& part : plan_relevancy(shape, threads, shares).parts) {
    if (!list || part.teams == 0) continue;
    PyObject* found = Py_BuildValue(
        "{s:n,s:n,s:i,s:i}", "begin", static_cast<Py_ssize_t>(part.begin), "end",
        static_cast<Py_ssize_t>(part.end), "teams", part.teams, "members", part.members);
    if (!found || PyList_Append(list, found) < 0) Py_CLEAR(list);
    Py_XDECREF(found);
  }
  return list;
}

PyObject* lstm_gpu_plan(PyObject*, PyObject* args) {
  Py_ssize_t T, B, D, H;
  int scalar_bytes, backward, tf32;
  const char* tier;
  Gpu gpu{};
  if (!PyArg_ParseTuple(args, "nnnnipps(iiiidd)", &T, &B, &D, &H, &scalar_bytes, &backward, &tf32,
                        &tier, &gpu.compute, &gpu.multiprocessors, &gpu.shared_bytes, &gpu.cluster,
                        &gpu.ghz, &gpu.memory_gbs)) {
    return nullptr;
  }
  if (!are_sizes({T, B, D, H, scalar_bytes, gpu.multiprocessors, gpu.shared_bytes, gpu.cluster}))
    return nullptr;
  Tier only = Tier::kNone;
  if (!tier_named(tier, &only)) {
    PyErr_Format(PyExc_ValueError, "tier should be '', resident, grid or stepwise, got '%s'", tier);
    return nullptr;
  }
  const RecurrenceShape shape{T, B, D, H, scalar_bytes, backward != 0, tf32 != 0};
  const RecurrencePlan p = plan(shape, gpu, only);
  return Py_BuildValue("{s:s,s:s,s:i,s:i,s:i,s:i,s:i,s:i,s:n,s:i,s:i,s:n,s:d}", "tier",
                       tier_name(p.tier), "reason", p.reason ? p.reason : "", "groups",
                       p.partition.groups, "ranks", p.partition.ranks, "units", p.partition.units,
                       "parts", p.partition.parts, "samples", 8 * p.tiles_n, "held", p.held,
                       "blocks", static_cast<Py_ssize_t>(p.blocks()), "threads", p.threads,
                       "shared_bytes", p.shared_bytes, "barriers",
                       static_cast<Py_ssize_t>(p.barriers(T)), "microseconds", p.microseconds);
}

// As `bench profile` shows them.
constexpr const char* kPhaseNames[kPhases] = {
    "pack", "gather",    "input",   "recurrent",       "pointwise", "projection", "scores",
    "sums", "screening", "weights", "input_gradients", "finish",    "wait",       "other"};

PyObject* set_profile(PyObject*, PyObject* args) {
  int on;
  if (!PyArg_ParseTuple(args, "p", &on)) return nullptr;
  set_profiling(on);
  Py_RETURN_NONE;
}

PyObject* profile(PyObject*, PyObject* args) {
  const char* name = nullptr;
  if (!PyArg_ParseTuple(args, "s", &name)) return nullptr;
  const Operator* op = operator_named(name);
  if (!op) return PyErr_Format(PyExc_ValueError, "no operator is named '%s'", name);
  const Profile& p = op->profile;
  PyObject* result = Py_BuildValue("{s:L,s:L,s:L,s:L}", "calls", p.calls, "workers", p.workers,
                                   "allocate", p.allocate, "whole", p.whole);
  for (int phase = 0; result && phase < kPhases; ++phase) {
    PyObject* ticks = PyLong_FromLongLong(p.phases[phase]);
    if (!ticks || PyDict_SetItemString(result, kPhaseNames[phase], ticks) < 0) Py_CLEAR(result);
    Py_XDECREF(ticks);
  }
  return result;
}

PyObject* ticks(PyObject*, PyObject*) { return PyLong_FromLongLong(read_ticks()); }

PyObject* multiply_adds(PyObject*, PyObject* args) {
  Py_ssize_t repeats;
  int parts;
  if (!PyArg_ParseTuple(args, "ni", &repeats, &parts)) return nullptr;
  const Runtime runtime = cpu_runtime();
  struct Context {
    int64_t repeats, done;
    int parts;
    int64_t multiply() const {
      const LstmSplitKernels* const split = lstm_split_kernels();
      const LstmBFloat16Kernels* const bfloat16 = lstm_bfloat16_kernels();
      if (parts > 1 && split) return split->multiply_adds(repeats, parts);
      if (parts == 1 && bfloat16) return bfloat16->multiply_adds(repeats);
      return lstm_kernels().multiply_adds(repeats);
    }
  } context{repeats, 0, parts};
  runtime.parallel(
      runtime.threads,
      [](void* raw, int begin, int end) {
        Context& context = *static_cast<Context*>(raw);
        for (int worker = begin; worker < end; ++worker)
          __atomic_fetch_add(&context.done, context.multiply(), __ATOMIC_RELAXED);
      },
      &context);
  return PyLong_FromLongLong(context.done);
}

PyObject* meet(PyObject*, PyObject* args) {
  int members;
  Py_ssize_t times;
  if (!PyArg_ParseTuple(args, "in", &members, &times)) return nullptr;
  lstm_kernels().meet(cpu_runtime(), members, times);
  Py_RETURN_NONE;
}

PyMethodDef methods[] = {
    {"isa", name_of_isa, METH_NOARGS, "Name of the instruction set whose kernels run."},
    {"runnable_isas", runnable_isas, METH_NOARGS,
     "Names of the instruction sets that this machine can run, best first."},
    {"set_isa", set_isa, METH_VARARGS, "set_isa(name): run another instruction set's kernels."},
    {"empty_cache", empty_cache, METH_NOARGS, "Give idle buffers back to the operating system."},
    {"cache_statistics", cache_statistics, METH_NOARGS,
     "Bytes of the buffer cache: used_bytes, idle_bytes, peak_used_bytes."},
    {"workers", workers, METH_NOARGS,
     "Workers that a kernel may have now, and the CPUs: affinity, quota (0: none), taken by "
     "others."},
    {"pretend_cpus", pretend_cpus_are, METH_VARARGS,
     "pretend_cpus(count): as if there were that many free CPUs; 0: what the system says."},
    {"cgroup_quota", quota_below, METH_VARARGS,
     "cgroup_quota(root): CPUs that the control groups described below that folder grant, 0: all."},
    {"lstm_plan", lstm_plan, METH_VARARGS,
     "lstm_plan(T, B, I, H, R, scalar_bytes, threads, unit=False): how the CPU kernels divide that "
     "work, or those for a matrix unit: of "
     "both passes the rows of groups, and blocks of units of the members of a team, as [begin, "
     "end)."},
    {"float32_parts", parts_of_float32, METH_VARARGS,
     "float32_parts(T, B, I, H, R): bfloat16 parts of a float32 number in the products of such an "
     "LSTM now; 0: vectors multiply."},
    {"float32_parts_asked", parts_asked, METH_NOARGS,
     "Those that torch.get_float32_matmul_precision() asks for, where a matrix unit multiplies."},
    {"rel_lstm_plan", rel_lstm_plan, METH_VARARGS,
     "rel_lstm_plan(T, B, I, H, A, scalar_bytes, threads): the same."},
    {"relevancy_plan", relevancy_plan, METH_VARARGS,
     "relevancy_plan(sequences, T, D, attended, threads, shares): the parts, one after the other, "
     "of "
     "relevancy attention; attended: keys of a query; shares: whether members of a team share a "
     "sequence."},
    {"lstm_gpu_plan", lstm_gpu_plan, METH_VARARGS,
     "lstm_gpu_plan(T, B, D, H, scalar_bytes, backward, tf32, tier, gpu): how the GPU kernels "
     "divide "
     "that "
     "work on a GPU (compute, multiprocessors, shared_bytes, cluster, ghz, memory_gbs)."},
    {"set_profile", set_profile, METH_VARARGS,
     "set_profile(on): start to time the phases of operators, from zero, or stop."},
    {"profile", profile, METH_VARARGS,
     "profile(operator): sums over its calls since set_profile(True); times in ticks, those of "
     "phases over all workers."},
    {"ticks", ticks, METH_NOARGS, "The clock of profile()."},
    {"multiply_adds", multiply_adds, METH_VARARGS,
     "multiply_adds(repeats, parts): runs the kernels' tiles in the first-level cache on all "
     "threads and returns the number of multiply-adds: of float32 by vectors, or of numbers of so "
     "many bfloat16 parts where the kernels multiply those."},
    {"meet", meet, METH_VARARGS,
     "meet(members, times): that many workers meet so often at a barrier of the kernels."},
    {nullptr, nullptr, 0, nullptr}};

PyModuleDef module = {PyModuleDef_HEAD_INIT,
                      "_C",
                      "throughtime's compiled kernels.",
                      -1,
                      methods,
                      nullptr,
                      nullptr,
                      nullptr,
                      nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__C(void) { return PyModule_Create(&module); }
