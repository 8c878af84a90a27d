/* Threads that stay known to Python until they end.
 *
 * nbdkit brackets each callback with PyGILState_Ensure and PyGILState_Release; for a thread that
 * is not Python's own, each pair makes a thread state and throws it away.  One more Ensure keeps
 * the state.  Its Release has to be made by the same thread: here when the thread ends, by a
 * destructor registered with the C library, which runs before Python's thread key is cleared. */
#include "engine.h"

/* glibc's, for what C++ calls thread_local; musl has none. */
int __cxa_thread_atexit_impl(void (*)(void *), void *, void *) __attribute__((weak));
extern void *__dso_handle __attribute__((visibility("hidden")));

static __thread bool kept;

bool thread_can_be_kept(void) { return __cxa_thread_atexit_impl != NULL; }

static void release(void *unused) {
    if (!Py_IsInitialized())
        return; /* the interpreter has ended before the thread did */
    PyGILState_STATE state = PyGILState_Ensure();
    PyGILState_Release(PyGILState_LOCKED); /* the one that was kept */
    PyGILState_Release(state);
}

void thread_keep(void) {
    if (kept || !thread_can_be_kept())
        return;
    kept = true;
    PyGILState_Ensure();
    if (__cxa_thread_atexit_impl(release, NULL, &__dso_handle))
        PyGILState_Release(PyGILState_LOCKED);
}
