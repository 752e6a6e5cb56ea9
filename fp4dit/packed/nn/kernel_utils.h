/* What the kernels share: 16-bit floats, and threads. */
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define ALWAYS_INLINE static inline __attribute__((always_inline))

enum { FLOAT32, BFLOAT16 };

static inline float read_bfloat16(uint16_t x) {
    uint32_t bits = (uint32_t)x << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

static inline uint16_t round_to_bfloat16(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    return value == value ? (uint16_t)rounded : 0x7fc0;
}

typedef struct {
    void (*run)(void *task, int64_t first, int64_t last);
    void *task;
    int64_t first, last;
} Share;

static void *run_share(void *share) {
    Share *s = share;
    s->run(s->task, s->first, s->last);
    return NULL;
}

/* Runs a task of `count` equal parts in up to `threads` threads. They end with the call: a pool
 * would not survive a fork, and costs no less than the start of a thread if it does not spin. */
static void run_parallel(void (*run)(void *, int64_t, int64_t), void *task, int64_t count, int threads) {
    enum { MOST = 64 };
    Share shares[MOST];
    pthread_t ids[MOST];
    int started[MOST];
    if (threads > count) threads = (int)count;
    if (threads > MOST) threads = MOST;
    for (int i = 1; i < threads; i++) {
        shares[i] = (Share){run, task, count * i / threads, count * (i + 1) / threads};
        started[i] = !pthread_create(&ids[i], NULL, run_share, &shares[i]);
    }
    run(task, 0, threads > 1 ? count / threads : count);
    for (int i = 1; i < threads; i++) {
        if (started[i])
            pthread_join(ids[i], NULL);
        else
            run_share(&shares[i]);
    }
}
