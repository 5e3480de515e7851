// Works in spans, as OTEP 4947 says, and records each of them. Arguments: how many threads, and a library to open for the variable,
// or nothing. Output, once it has published its process context: "ready"; then one line for each span: thread, trace, span, function, local root span.
// With BLOCKS the functions sleep instead of computing. With PRELOAD it is a library for LD_PRELOAD: threads are in a span of their own, whose id
// is their thread id, while they wait for a condition.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

struct record {
	uint8_t trace[16], span[8], valid, flags;
	uint16_t bytes;
	uint8_t attributes[64];
};

#ifdef OWN_VARIABLE
__thread void *otel_thread_ctx_v1;
void set_span(void *record) { *(void *volatile *)&otel_thread_ctx_v1 = record; }
#else
void set_span(void *record);
#endif
static void (*set)(void *);

static void put(uint8_t *to, uint64_t number)
{
	for (int i = 0; i < 8; i++)
		to[i] = number >> (56 - 8 * i);
}

static uint64_t now(void)
{
	struct timespec t;
	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec * 1000000000ull + t.tv_nsec;
}

// Each function computes or sleeps on its own, so that the stack of a sample says in which one it was taken.
static volatile uint64_t sink;
#ifdef BLOCKS
#define SPIN(name) \
	__attribute__((noinline)) void name(uint64_t ns) { nanosleep(&(struct timespec){ .tv_nsec = ns }, NULL); sink++; }
#else
#define SPIN(name) \
	__attribute__((noinline)) void name(uint64_t loops) { for (uint64_t i = 0; i < loops; i++) sink += i; sink++; }
#endif
SPIN(spin_0) SPIN(spin_1) SPIN(spin_2) SPIN(spin_3)
SPIN(outside)
static void (*const spins[])(uint64_t) = { spin_0, spin_1, spin_2, spin_3 };

static void fill(struct record *record, uint64_t thread, uint64_t trace, uint64_t span, uint64_t which)
{
	memset(record, 0, sizeof(*record));
	put(record->trace, thread);
	put(record->trace + 8, trace);
	put(record->span, span);
	// Attribute 0 is the local root span in hex, 1 the route.
	record->attributes[0] = 0;
	record->attributes[1] = 16;
	sprintf((char *)record->attributes + 2, "%016lx", (unsigned long)(span & ~3ull));
	record->attributes[18] = 1;
	record->attributes[19] = 2;
	record->attributes[20] = '/';
	record->attributes[21] = '0' + which;
	record->bytes = 22;
	record->valid = 1;
}

static void *work(void *number)
{
	uint64_t thread = (uint64_t)(uintptr_t)number, count = 0;
	struct record record;

	for (;;) {
		uint64_t which = count % 4, span = ((thread + 1) << 48) | ++count;

		fill(&record, thread + 1, count / 8 + 1, span, which);
		flockfile(stdout);
		printf("%ld %016lx%016lx %016lx spin_%d %016lx\n", (long)syscall(SYS_gettid), (unsigned long)(thread + 1),
		       (unsigned long)(count / 8 + 1), (unsigned long)span, (int)which, (unsigned long)(span & ~3ull));
		funlockfile(stdout);
		set(&record);
		spins[which](3000000);
		set(NULL);
		outside(1000000);
		if (count % 3)
			continue;
		// A record that is being written is none.
		record.valid = 0;
		set(&record);
		outside(1000000);
		set(NULL);
	}
	return NULL;
}

static int text(uint8_t *to, int field, const char *text)
{
	int length = strlen(text);
	to[0] = field << 3 | 2;
	to[1] = length;
	memcpy(to + 2, text, length);
	return length + 2;
}

static int nest(uint8_t *to, int field, const uint8_t *from, int length)
{
	to[0] = field << 3 | 2;
	to[1] = length;
	memcpy(to + 2, from, length);
	return length + 2;
}

static int pair(uint8_t *to, int field, const char *key, const uint8_t *value, int length)
{
	uint8_t entry[128];
	int at = text(entry, 1, key);
	at += nest(entry + at, 2, value, length);
	return nest(to, field, entry, at);
}

static void publish(void)
{
	static uint8_t payload[512], value[128], values[128], entry[128];
	int at = 0, length, all = 0, fd = memfd_create("OTEL_CTX", 0);
	uint8_t *region;

	length = text(value, 1, "span-shop");
	length = pair(entry, 1, "service.name", value, length);
	at += nest(payload + at, 1, entry, length);
	length = text(value, 1, "tlsdesc_v1_dev");
	at += pair(payload + at, 2, "threadlocal.schema_version", value, length);
	for (int i = 0; i < 2; i++) {
		length = text(value, 1, i ? "http.route" : "datadog.local_root_span_id");
		all += nest(values + all, 1, value, length);
	}
	length = nest(value, 5, values, all);
	at += pair(payload + at, 2, "threadlocal.attribute_key_map", value, length);

	if (fd < 0 || ftruncate(fd, 4096))
		abort();
	region = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE, fd, 0);
	close(fd);
	*(uint32_t *)(region + 8) = 2;
	*(uint32_t *)(region + 12) = at;
	*(uint64_t *)(region + 16) = now();
	*(uint8_t **)(region + 24) = payload;
	__sync_synchronize();
	memcpy(region, "OTEL_CTX", 8);
}

#ifdef PRELOAD
__attribute__((constructor)) static void begin(void) { publish(); }

static void enter(struct record *record)
{
	long thread = syscall(SYS_gettid);

	fill(record, thread, thread, thread, thread % 4);
	set_span(record);
}

// The address of the function that the program would call. Without the version it would be that of an old one.
#define NEXT(name) ((typeof(&name))dlvsym(RTLD_NEXT, #name, "GLIBC_2.3.2"))

int pthread_cond_wait(pthread_cond_t *condition, pthread_mutex_t *mutex)
{
	struct record record;

	enter(&record);
	int result = NEXT(pthread_cond_wait)(condition, mutex);
	set_span(NULL);
	return result;
}

int pthread_cond_timedwait(pthread_cond_t *condition, pthread_mutex_t *mutex, const struct timespec *until)
{
	struct record record;

	enter(&record);
	int result = NEXT(pthread_cond_timedwait)(condition, mutex, until);
	set_span(NULL);
	return result;
}
#else
int main(int argc, char **argv)
{
	pthread_t thread;
	long threads = atol(argv[1]);

#ifdef OPENS
	void *library = dlopen(argv[2], RTLD_NOW);
	if (!library)
		abort();
	set = dlsym(library, "set_span");
#else
	set = set_span;
#endif
	// For a benchmark: no threads, one span that never ends, published or not.
	if (!threads) {
		struct record record;

		fill(&record, 1, 1, 1, 1);
		set(&record);
		if (argc > 2)
			publish();
		spin_0(~0ull);
	}
	publish();
	setvbuf(stdout, NULL, _IOLBF, 0);
	puts("ready");
	for (long i = 0; i < threads; i++)
		pthread_create(&thread, NULL, work, (void *)i);
	pthread_join(thread, NULL);
}
#endif
