/* A pool of threads for short work. An atomic counter hands out parts. Workers without a part look for new work for some tens
 * of microseconds before they sleep, so that they are awake for the next call, which comes soon in a decoder step.
 */
#include "kernels.h"

#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <time.h>

enum { MOST = 256, SPIN_NANOSECONDS = 50000 };

static pthread_mutex_t callers = PTHREAD_MUTEX_INITIALIZER; /* held for the whole of a call */
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;    /* of the sleepers */
static pthread_cond_t wake = PTHREAD_COND_INITIALIZER;
static int wanted = 1, started = 1; /* threads, the caller's included; guarded by `callers` */
static pthread_t threads[MOST];
static _Thread_local int inside; /* this thread runs parts */

static struct {
    void (*work)(void *, int);
    void *argument;
    int parts;
    _Alignas(64) atomic_int next;   /* the next part to take */
    _Alignas(64) atomic_int active; /* workers that may be reading the fields above */
    _Alignas(64) atomic_uint calls; /* grows with every call, and when workers must end; they watch it */
    atomic_int open;                /* parts may be taken */
    atomic_int sleepers, leave;
} pool;

static void relax(void) {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

static int64_t now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

static void take_parts(void) {
    inside = 1;
    for (int part; (part = atomic_fetch_add(&pool.next, 1)) < pool.parts;) pool.work(pool.argument, part);
    inside = 0;
}

static unsigned next_call(unsigned last) {
    unsigned call;
    for (const int64_t end = now() + SPIN_NANOSECONDS; now() < end;)
        for (int i = 0; i < 64; i++) {
            if ((call = atomic_load(&pool.calls)) != last) return call;
            relax();
        }
    pthread_mutex_lock(&lock);
    atomic_fetch_add(&pool.sleepers, 1); /* before reading `calls`; `announce` reads it after the change */
    while ((call = atomic_load(&pool.calls)) == last) pthread_cond_wait(&wake, &lock);
    atomic_fetch_sub(&pool.sleepers, 1);
    pthread_mutex_unlock(&lock);
    return call;
}

static void *worker(void *argument) {
    for (unsigned last = (unsigned)(uintptr_t)argument;;) {
        last = next_call(last);
        if (atomic_load(&pool.leave)) return NULL;
        /* A late worker finds the call closed, or the next one open; the caller waits for all that are active. */
        atomic_fetch_add(&pool.active, 1);
        if (atomic_load(&pool.open)) take_parts();
        atomic_fetch_sub(&pool.active, 1);
    }
}

static void announce(void) {
    atomic_fetch_add(&pool.calls, 1);
    if (atomic_load(&pool.sleepers)) {
        pthread_mutex_lock(&lock);
        pthread_cond_broadcast(&wake);
        pthread_mutex_unlock(&lock);
    }
}

static void start_or_end_workers(void) {
    if (started > wanted) {
        atomic_store(&pool.leave, 1);
        announce();
        while (started > 1) pthread_join(threads[--started], NULL);
        atomic_store(&pool.leave, 0);
    }
    if (started == wanted) return;
    sigset_t all, before; /* signals are for the program's own threads */
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    for (; started < wanted; started++)
        if (pthread_create(threads + started, NULL, worker, (void *)(uintptr_t)atomic_load(&pool.calls))) {
            wanted = started; /* the system gives no more */
            break;
        }
    pthread_sigmask(SIG_SETMASK, &before, NULL);
}

void bstack_parallel(void (*work)(void *, int), void *argument, int parts) {
    if (inside || parts <= 1) {
        for (int part = 0; part < parts; part++) work(argument, part);
        return;
    }
    pthread_mutex_lock(&callers);
    start_or_end_workers();
    pool.work = work;
    pool.argument = argument;
    pool.parts = parts;
    atomic_store(&pool.next, 0);
    if (started > 1) {
        atomic_store(&pool.open, 1);
        announce();
    }
    take_parts();
    atomic_store(&pool.open, 0);
    for (int looks = 0; atomic_load(&pool.active); looks++)
        if (looks < 10000)
            relax();
        else /* the worker has lost its core: free this one for it */
            sched_yield();
    pthread_mutex_unlock(&callers);
}

void bstack_set_threads(int count) {
    pthread_mutex_lock(&callers);
    wanted = count < 1 ? 1 : count > MOST ? MOST : count;
    pthread_mutex_unlock(&callers);
}

int bstack_threads(void) {
    pthread_mutex_lock(&callers);
    const int count = wanted;
    pthread_mutex_unlock(&callers);
    return count;
}

/* A fork waits for a running call. The child has no workers; it starts its own when it needs them. */
static void before_fork(void) {
    pthread_mutex_lock(&callers);
    pthread_mutex_lock(&lock);
}

static void in_parent(void) {
    pthread_mutex_unlock(&lock);
    pthread_mutex_unlock(&callers);
}

static void in_child(void) {
    started = 1;
    atomic_store(&pool.active, 0);
    atomic_store(&pool.sleepers, 0);
    pthread_mutex_init(&lock, NULL);
    pthread_cond_init(&wake, NULL);
    pthread_mutex_init(&callers, NULL);
}

__attribute__((constructor)) static void watch_forks(void) { pthread_atfork(before_fork, in_parent, in_child); }
