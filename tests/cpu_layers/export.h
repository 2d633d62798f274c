// Makes functions of a layer callable from Python; see conftest.py.
#pragma once

#define EXPORT_AS(name, ...)                                                       \
  extern "C" {                                                                     \
  extern __attribute__((visibility("default"))) decltype(&__VA_ARGS__) const name; \
  decltype(&__VA_ARGS__) const name = &__VA_ARGS__;                                \
  }

// A template function in both precisions.
#define EXPORT(function)                     \
  EXPORT_AS(function##_f32, function<float>) \
  EXPORT_AS(function##_f64, function<double>)

// A function that takes no floating point numbers.
#define EXPORT_PLAIN(function) EXPORT_AS(function##_plain, function)
