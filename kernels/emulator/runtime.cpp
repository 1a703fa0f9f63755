// The runtime library as one compilation unit, so that the checks of a load or store are inlined into the
// call-back that the compiler emits for it.
#include "fibers.cpp"
#include "shadow.cpp"
#include "diagnostics.cpp"
#include "schedule.cpp"
#include "collectives.cpp"
#include "memory.cpp"
#include "undefined.cpp"
#include "guards.cpp"
#include "launch.cpp"
