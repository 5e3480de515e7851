// SPDX-License-Identifier: Apache-2.0
/*
 * A small shop for a profiler to measure: threads that parse requests, price carts, sign receipts, sort a catalogue and
 * index its texts, with call chains of 30 frames and a cache that they contend for. Nothing comes over the network;
 * the requests are made up, the same at each run.
 *
 * Every thread keeps to a share of the CPU that `--load` sets (percent of one core, all threads together), whatever
 * the speed of the machine:
 *
 *	checkout-0, checkout-1	32 % each	parse, price, reserve, render, compress, sign
 *	catalogue		20 %		sort and page the products
 *	indexer			12 %		full-text index of the descriptions
 *	sessions		 4 %		sweep the session cache under its lock
 *
 * At its exit it prints its CPU time by the kernel's account, to compare with a profile.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <time.h>
#include <unistd.h>

#define ARRAY_LEN(a) (sizeof(a) / sizeof((a)[0]))

static atomic_bool stopping;
static atomic_ulong requests_served;

/* ---- numbers that look random and are the same at each run ---- */

struct rng {
	uint64_t state;
};

static uint32_t rng_next(struct rng *rng)
{
	rng->state ^= rng->state << 13;
	rng->state ^= rng->state >> 7;
	rng->state ^= rng->state << 17;
	return (uint32_t)(rng->state >> 32);
}

static uint32_t rng_below(struct rng *rng, uint32_t bound)
{
	return rng_next(rng) % bound;
}

/* ---- the catalogue: products, some of them bundles of others ---- */

enum { PRODUCTS = 4096, BUNDLE_LEVELS = 8, PARTS_PER_BUNDLE = 2, NAME_BYTES = 32 };

struct product {
	char name[NAME_BYTES];
	uint32_t cents;
	uint32_t weight_grams;
	uint32_t campaign;
	/* 0: a plain product; otherwise a bundle of products one level below. */
	uint32_t level;
	uint32_t parts[PARTS_PER_BUNDLE];
};

static struct product catalogue[PRODUCTS];

static const char *const words[] = {
	"amber",  "basket", "candle", "drawer", "enamel",  "fabric", "garden",	"hammer", "indigo", "jacket",  "kettle",
	"ladder", "mirror", "needle", "orange", "pepper",  "quartz", "ribbon",	"silver", "timber", "urchin",  "velvet",
	"walnut", "yellow", "zipper", "copper", "lantern", "marble", "saffron", "teapot", "window", "blanket",
};

static void stock_catalogue(void)
{
	struct rng rng = { .state = 0x9e3779b97f4a7c15u };

	for (uint32_t i = 0; i < PRODUCTS; i++) {
		struct product *product = &catalogue[i];

		snprintf(product->name, sizeof(product->name), "%s %s %u", words[rng_below(&rng, ARRAY_LEN(words))],
			 words[rng_below(&rng, ARRAY_LEN(words))], i);
		product->cents = 99 + rng_below(&rng, 20000);
		product->weight_grams = 20 + rng_below(&rng, 4000);
		product->campaign = rng_below(&rng, 16);
		/* Level n stands in the n-th slice, so that a bundle's parts are always one level lower. */
		product->level = i * (BUNDLE_LEVELS + 1) / PRODUCTS;
		for (int part = 0; product->level > 0 && part < PARTS_PER_BUNDLE; part++) {
			uint32_t slice = PRODUCTS / (BUNDLE_LEVELS + 1);

			product->parts[part] = (product->level - 1) * slice + rng_below(&rng, slice);
		}
	}
}

/* ---- JSON: a request body to a cart ---- */

enum { CART_LINES = 6, BODY_BYTES = 2048 };

struct cart {
	uint32_t customer;
	int lines;
	struct {
		uint32_t product;
		uint32_t quantity;
	} line[CART_LINES];
};

struct json {
	const char *at;
	/* The key that the value under way belongs to. */
	char key[16];
	struct cart *cart;
};

static bool json_parse_value(struct json *json);

static void json_skip_space(struct json *json)
{
	while (*json->at == ' ' || *json->at == '\n')
		json->at++;
}

static bool json_parse_string(struct json *json, char *into, size_t size)
{
	size_t length = 0;

	if (*json->at++ != '"')
		return false;
	for (; *json->at && *json->at != '"'; json->at++) {
		if (*json->at == '\\' && json->at[1])
			json->at++;
		if (length + 1 < size)
			into[length++] = *json->at;
	}
	into[length] = '\0';
	return *json->at++ == '"';
}

static void json_store_number(struct json *json, uint32_t number)
{
	struct cart *cart = json->cart;

	if (!strcmp(json->key, "customer"))
		cart->customer = number;
	else if (!strcmp(json->key, "product") && cart->lines < CART_LINES)
		cart->line[cart->lines].product = number % PRODUCTS;
	else if (!strcmp(json->key, "quantity") && cart->lines < CART_LINES)
		cart->line[cart->lines++].quantity = number;
}

static bool json_parse_number(struct json *json)
{
	uint32_t number = 0;

	if (*json->at < '0' || *json->at > '9')
		return false;
	while (*json->at >= '0' && *json->at <= '9')
		number = number * 10 + (uint32_t)(*json->at++ - '0');
	json_store_number(json, number);
	return true;
}

static bool json_parse_member(struct json *json)
{
	json_skip_space(json);
	if (!json_parse_string(json, json->key, sizeof(json->key)))
		return false;
	json_skip_space(json);
	return *json->at++ == ':' && json_parse_value(json);
}

static bool json_parse_object(struct json *json)
{
	json->at++;
	do {
		if (!json_parse_member(json))
			return false;
		json_skip_space(json);
	} while (*json->at++ == ',');
	return json->at[-1] == '}';
}

static bool json_parse_array(struct json *json)
{
	json->at++;
	do {
		if (!json_parse_value(json))
			return false;
		json_skip_space(json);
	} while (*json->at++ == ',');
	return json->at[-1] == ']';
}

static bool json_parse_value(struct json *json)
{
	char text[96];

	json_skip_space(json);
	switch (*json->at) {
	case '{':
		return json_parse_object(json);
	case '[':
		return json_parse_array(json);
	case '"':
		return json_parse_string(json, text, sizeof(text));
	default:
		return json_parse_number(json);
	}
}

static bool parse_request_body(const char *body, struct cart *cart)
{
	struct json json = { .at = body, .cart = cart };

	memset(cart, 0, sizeof(*cart));
	return json_parse_value(&json) && cart->lines > 0;
}

/* ---- prices: bundles of bundles, discounts as small expression trees ---- */

struct rule {
	enum { RULE_AND, RULE_OR, RULE_NOT, RULE_CAMPAIGN, RULE_HEAVIER, RULE_DEARER } kind;
	uint32_t operand;
	const struct rule *left, *right;
};

static const struct rule summer = { RULE_CAMPAIGN, 3, NULL, NULL }, winter = { RULE_CAMPAIGN, 11, NULL, NULL },
			 heavy = { RULE_HEAVIER, 2500, NULL, NULL }, dear = { RULE_DEARER, 9000, NULL, NULL },
			 light = { RULE_NOT, 0, &heavy, NULL }, season = { RULE_OR, 0, &summer, &winter },
			 light_and_dear = { RULE_AND, 0, &light, &dear },
			 seasonal_offer = { RULE_AND, 0, &season, &light_and_dear },
			 clearance = { RULE_OR, 0, &seasonal_offer, &light_and_dear };

static const struct {
	const struct rule *rule;
	uint32_t percent;
} discounts[] = { { &season, 5 }, { &seasonal_offer, 12 }, { &clearance, 7 }, { &dear, 2 } };

static bool is_in_campaign(const struct product *product, uint32_t campaign)
{
	/* A keyed hash selects the campaign's products, as in a shop without lists. */
	uint32_t hash = campaign * 2654435761u;

	for (const char *c = product->name; *c; c++)
		hash = (hash ^ (uint8_t)*c) * 16777619u;
	return product->campaign == campaign || hash % 61 == 0;
}

static bool evaluate_rule(const struct rule *rule, const struct product *product)
{
	switch (rule->kind) {
	case RULE_AND:
		return evaluate_rule(rule->left, product) && evaluate_rule(rule->right, product);
	case RULE_OR:
		return evaluate_rule(rule->left, product) || evaluate_rule(rule->right, product);
	case RULE_NOT:
		return !evaluate_rule(rule->left, product);
	case RULE_CAMPAIGN:
		return is_in_campaign(product, rule->operand);
	case RULE_HEAVIER:
		return product->weight_grams > rule->operand;
	default:
		return product->cents > rule->operand;
	}
}

static uint64_t apply_discounts(const struct product *product, uint64_t cents)
{
	for (size_t i = 0; i < ARRAY_LEN(discounts); i++)
		if (evaluate_rule(discounts[i].rule, product))
			cents -= cents * discounts[i].percent / 100;
	return cents;
}

static uint64_t price_product(const struct product *product);

static uint64_t price_bundle(const struct product *bundle)
{
	uint64_t cents = 0;

	for (int part = 0; part < PARTS_PER_BUNDLE; part++)
		cents += price_product(&catalogue[bundle->parts[part]]);
	return cents * 9 / 10;
}

static uint64_t price_product(const struct product *product)
{
	return apply_discounts(product, product->level ? price_bundle(product) : product->cents);
}

static uint64_t price_line(const struct cart *cart, int line)
{
	return price_product(&catalogue[cart->line[line].product]) * cart->line[line].quantity;
}

static uint64_t price_cart(const struct cart *cart)
{
	uint64_t cents = 0;

	for (int line = 0; line < cart->lines; line++)
		cents += price_line(cart, line);
	return cents;
}

/* ---- the session cache, which all threads contend for ---- */

enum { SESSIONS = 8192 };

static struct {
	pthread_mutex_t lock;
	struct {
		uint32_t customer;
		uint32_t age;
	} slot[SESSIONS];
} session_cache = { .lock = PTHREAD_MUTEX_INITIALIZER };

static void touch_session(uint32_t customer)
{
	pthread_mutex_lock(&session_cache.lock);
	for (uint32_t probe = 0; probe < 64; probe++) {
		uint32_t i = (customer * 2654435761u + probe) % SESSIONS;

		if (session_cache.slot[i].customer == customer || !session_cache.slot[i].customer || probe == 63) {
			session_cache.slot[i].customer = customer;
			session_cache.slot[i].age = 0;
			break;
		}
	}
	pthread_mutex_unlock(&session_cache.lock);
}

static void expire_sessions(void)
{
	pthread_mutex_lock(&session_cache.lock);
	for (uint32_t i = 0; i < SESSIONS; i++)
		if (session_cache.slot[i].customer && ++session_cache.slot[i].age > 1000)
			session_cache.slot[i].customer = 0;
	pthread_mutex_unlock(&session_cache.lock);
}

/* ---- the receipt: text, compressed, signed ---- */

enum { RECEIPT_BYTES = 4096, WINDOW = 256 };

struct receipt {
	size_t length, packed_length;
	char text[RECEIPT_BYTES];
	uint8_t packed[RECEIPT_BYTES * 2];
	uint32_t digest[8];
};

static void append_text(struct receipt *receipt, const char *text)
{
	while (*text && receipt->length < RECEIPT_BYTES - 1)
		receipt->text[receipt->length++] = *text++;
}

static void append_number(struct receipt *receipt, uint64_t number)
{
	char digits[24], *at = digits + sizeof(digits) - 1;

	*at = '\0';
	do {
		*--at = (char)('0' + number % 10);
	} while (number /= 10);
	append_text(receipt, at);
}

static void render_line(struct receipt *receipt, const struct cart *cart, int line)
{
	append_text(receipt, catalogue[cart->line[line].product].name);
	append_text(receipt, " x ");
	append_number(receipt, cart->line[line].quantity);
	append_text(receipt, " ........................................ ");
	append_number(receipt, catalogue[cart->line[line].product].cents);
	append_text(receipt, "\n");
}

static void render_receipt(struct receipt *receipt, const struct cart *cart, uint64_t cents)
{
	receipt->length = 0;
	append_text(receipt, "customer ");
	append_number(receipt, cart->customer);
	append_text(receipt, "\n");
	for (int line = 0; line < cart->lines; line++)
		render_line(receipt, cart, line);
	append_text(receipt, "total ");
	append_number(receipt, cents);
	append_text(receipt, "\n");
}

static size_t find_longest_match(const struct receipt *receipt, size_t at, size_t *distance)
{
	size_t best = 0;

	for (size_t from = at > WINDOW ? at - WINDOW : 0; from < at; from++) {
		size_t length = 0;

		while (at + length < receipt->length && length < 255 &&
		       receipt->text[from + length] == receipt->text[at + length])
			length++;
		if (length > best) {
			best = length;
			*distance = at - from;
		}
	}
	return best;
}

/* LZ77 with single-byte distances: a literal is {0, byte}, a copy {length, distance - 1}. */
static void compress_receipt(struct receipt *receipt)
{
	receipt->packed_length = 0;
	for (size_t at = 0; at < receipt->length;) {
		size_t distance = 0, length = find_longest_match(receipt, at, &distance);
		bool copy = length >= 3;

		receipt->packed[receipt->packed_length++] = (uint8_t)(copy ? length : 0);
		receipt->packed[receipt->packed_length++] = (uint8_t)(copy ? distance - 1 : (uint8_t)receipt->text[at]);
		at += copy ? length : 1;
	}
}

#define ROTATE_RIGHT(x, n) ((x) >> (n) | (x) << (32 - (n)))

/* FIPS 180-4, section 4.2.2. */
static const uint32_t sha256_constants[64] = {
	0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5,
	0xd807aa98, 0x12835b01, 0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174,
	0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da,
	0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967,
	0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85,
	0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070,
	0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3,
	0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2,
};

static void sha256_block(uint32_t digest[8], const uint8_t block[64])
{
	uint32_t w[64], s[8];

	for (int i = 0; i < 16; i++)
		w[i] = (uint32_t)block[4 * i] << 24 | (uint32_t)block[4 * i + 1] << 16 |
		       (uint32_t)block[4 * i + 2] << 8 | block[4 * i + 3];
	for (int i = 16; i < 64; i++)
		w[i] = w[i - 16] + w[i - 7] +
		       (ROTATE_RIGHT(w[i - 15], 7) ^ ROTATE_RIGHT(w[i - 15], 18) ^ w[i - 15] >> 3) +
		       (ROTATE_RIGHT(w[i - 2], 17) ^ ROTATE_RIGHT(w[i - 2], 19) ^ w[i - 2] >> 10);
	memcpy(s, digest, sizeof(s));
	for (int i = 0; i < 64; i++) {
		uint32_t t1 = s[7] + (ROTATE_RIGHT(s[4], 6) ^ ROTATE_RIGHT(s[4], 11) ^ ROTATE_RIGHT(s[4], 25)) +
			      ((s[4] & s[5]) ^ (~s[4] & s[6])) + sha256_constants[i] + w[i];
		uint32_t t2 = (ROTATE_RIGHT(s[0], 2) ^ ROTATE_RIGHT(s[0], 13) ^ ROTATE_RIGHT(s[0], 22)) +
			      ((s[0] & s[1]) ^ (s[0] & s[2]) ^ (s[1] & s[2]));

		for (int j = 7; j > 0; j--)
			s[j] = s[j - 1];
		s[4] += t1;
		s[0] = t1 + t2;
	}
	for (int i = 0; i < 8; i++)
		digest[i] += s[i];
}

static void sha256(uint32_t digest[8], const uint8_t *data, size_t length)
{
	static const uint32_t start[8] = { 0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a,
					   0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19 };
	uint8_t tail[128] = { 0 };
	size_t whole = length / 64, rest = length % 64, tail_length = rest < 56 ? 64 : 128;

	memcpy(digest, start, sizeof(start));
	for (size_t i = 0; i < whole; i++)
		sha256_block(digest, data + 64 * i);
	memcpy(tail, data + 64 * whole, rest);
	tail[rest] = 0x80;
	for (int i = 0; i < 8; i++)
		tail[tail_length - 1 - i] = (uint8_t)((uint64_t)length * 8 >> 8 * i);
	for (size_t at = 0; at < tail_length; at += 64)
		sha256_block(digest, tail + at);
}

static void sign_receipt(struct receipt *receipt)
{
	/* Signs repeatedly, like a key derivation: most of a shop's CPU time goes here. */
	sha256(receipt->digest, receipt->packed, receipt->packed_length);
	for (int round = 0; round < 24; round++)
		sha256(receipt->digest, (const uint8_t *)receipt->digest, sizeof(receipt->digest));
}

/* ---- checkout: one request ---- */

struct checkout {
	struct rng rng;
	char body[BODY_BYTES];
	struct receipt receipt;
};

/* Builds the request of a browser. Cheap, because profiles should show the other work. */
static void receive_request(struct checkout *checkout)
{
	int at = snprintf(
		checkout->body, BODY_BYTES,
		"{\"customer\": %u, \"session\": {\"agent\": \"browser \\\"gannet\\\"\", \"visits\": [%u, %u]},\n"
		" \"cart\": {\"lines\": [",
		1 + rng_below(&checkout->rng, 5000), rng_below(&checkout->rng, 100), rng_below(&checkout->rng, 100));

	for (int line = 0; line < CART_LINES; line++)
		at += snprintf(checkout->body + at, BODY_BYTES - (size_t)at,
			       "%s{\"item\": {\"note\": \"wrap it, please\", \"product\": %u, \"quantity\": %u}}",
			       line ? ", " : "", rng_below(&checkout->rng, PRODUCTS), 1 + rng_below(&checkout->rng, 9));
	snprintf(checkout->body + at, BODY_BYTES - (size_t)at, "]}}");
}

static void issue_receipt(struct receipt *receipt, const struct cart *cart, uint64_t cents)
{
	render_receipt(receipt, cart, cents);
	compress_receipt(receipt);
	sign_receipt(receipt);
}

static void handle_checkout(struct checkout *checkout)
{
	struct cart cart;

	if (!parse_request_body(checkout->body, &cart)) {
		fprintf(stderr, "webshop: bad request: %s\n", checkout->body);
		abort();
	}
	touch_session(cart.customer);
	issue_receipt(&checkout->receipt, &cart, price_cart(&cart));
}

static void route_request(struct checkout *checkout)
{
	handle_checkout(checkout);
	atomic_fetch_add(&requests_served, 1);
}

static void serve_checkout(void *state)
{
	receive_request(state);
	route_request(state);
}

/* ---- catalogue: sort all products by name, show a page ---- */

struct listing {
	const struct product *sorted[PRODUCTS], *spare[PRODUCTS];
	uint64_t seen;
};

static int compare_names(const char *a, const char *b)
{
	for (; *a && *a == *b; a++, b++)
		;
	return (uint8_t)*a - (uint8_t)*b;
}

static int compare_products(const struct product *a, const struct product *b)
{
	int order = compare_names(a->name, b->name);

	return order ? order : (a->cents > b->cents) - (a->cents < b->cents);
}

static void merge_runs(const struct product **run, const struct product **spare, size_t middle, size_t length)
{
	size_t left = 0, right = middle;

	memcpy(spare, run, length * sizeof(*run));
	for (size_t i = 0; i < length; i++)
		run[i] = right >= length || (left < middle && compare_products(spare[left], spare[right]) <= 0) ?
				 spare[left++] :
				 spare[right++];
}

static void merge_sort(const struct product **run, const struct product **spare, size_t length)
{
	if (length < 2)
		return;
	merge_sort(run, spare, length / 2);
	merge_sort(run + length / 2, spare, length - length / 2);
	merge_runs(run, spare, length / 2, length);
}

static void sort_catalogue(struct listing *listing)
{
	for (size_t i = 0; i < PRODUCTS; i++)
		listing->sorted[i] = &catalogue[i];
	merge_sort(listing->sorted, listing->spare, PRODUCTS);
}

static void render_page(struct listing *listing)
{
	for (size_t i = 0; i < 100; i++)
		listing->seen += listing->sorted[listing->seen % PRODUCTS]->cents;
}

static void refresh_catalogue(void *state)
{
	sort_catalogue(state);
	render_page(state);
}

/* ---- indexer: the words of the descriptions into a trie ---- */

enum { TRIE_NODES = 32768, LETTERS = 27 };

struct search_index {
	struct rng rng;
	uint32_t used;
	struct {
		uint32_t child[LETTERS];
		uint32_t postings;
	} node[TRIE_NODES];
};

static void add_posting(struct search_index *index, uint32_t node)
{
	index->node[node].postings++;
}

static void trie_insert(struct search_index *index, uint32_t node, const char *word)
{
	uint32_t *child;

	if (*word == '\0' || *word == ' ') {
		add_posting(index, node);
		return;
	}
	child = &index->node[node].child[*word >= 'a' && *word <= 'z' ? *word - 'a' : LETTERS - 1];
	if (!*child)
		*child = ++index->used;
	trie_insert(index, *child, word + 1);
}

static void index_words(struct search_index *index, const char *text)
{
	for (const char *at = text; *at; at++)
		if (at == text || at[-1] == ' ')
			trie_insert(index, 0, at);
}

static void index_document(struct search_index *index, const struct product *product)
{
	index_words(index, product->name);
}

static void rebuild_index(void *state)
{
	struct search_index *index = state;

	/* Enough room for all words of the catalogue: at most one node for each byte of a name. */
	_Static_assert(TRIE_NODES >= PRODUCTS * 8, "the trie holds the words of the whole catalogue");
	memset(index->node, 0, (index->used + 1) * sizeof(index->node[0]));
	index->used = 0;
	for (size_t i = 0; i < PRODUCTS && index->used + NAME_BYTES < TRIE_NODES; i++)
		index_document(index, &catalogue[i]);
}

static void sweep_sessions(void *state)
{
	(void)state;
	expire_sessions();
}

/* ---- threads ---- */

struct worker {
	const char *name;
	void (*work)(void *);
	void *state;
	/* Of the whole load. */
	double percent;
	/* Of one core: set from the command line. */
	double share;
	pthread_t thread;
};

static double seconds_on(clockid_t clock)
{
	struct timespec now;

	clock_gettime(clock, &now);
	return (double)now.tv_sec + (double)now.tv_nsec / 1e9;
}

/*
 * Sleeps until the thread's CPU time is its share of the time that has passed. Not for less than 2 ms, or profiles would show
 * mostly the scheduler.
 */
static void wait_for_request(const struct worker *worker, double since)
{
	double ahead = seconds_on(CLOCK_THREAD_CPUTIME_ID) / worker->share - (seconds_on(CLOCK_MONOTONIC) - since);

	if (ahead > 2e-3) {
		struct timespec pause = { .tv_sec = (time_t)ahead,
					  .tv_nsec = (long)((ahead - (double)(time_t)ahead) * 1e9) };

		nanosleep(&pause, NULL);
	}
}

static void worker_loop(const struct worker *worker)
{
	double since = seconds_on(CLOCK_MONOTONIC);

	while (!atomic_load(&stopping)) {
		worker->work(worker->state);
		wait_for_request(worker, since);
	}
}

static void *worker_main(void *worker)
{
	pthread_setname_np(pthread_self(), ((struct worker *)worker)->name);
	worker_loop(worker);
	return NULL;
}

static struct checkout checkouts[2] = { { .rng = { 0x2545f4914f6cdd1du } }, { .rng = { 0x6a09e667f3bcc909u } } };
static struct listing listing;
static struct search_index search_index;

static struct worker workers[] = {
	{ .name = "checkout-0", .work = serve_checkout, .state = &checkouts[0], .percent = 32 },
	{ .name = "checkout-1", .work = serve_checkout, .state = &checkouts[1], .percent = 32 },
	{ .name = "catalogue", .work = refresh_catalogue, .state = &listing, .percent = 20 },
	{ .name = "indexer", .work = rebuild_index, .state = &search_index, .percent = 12 },
	{ .name = "sessions", .work = sweep_sessions, .state = NULL, .percent = 4 },
};

static int usage(int status)
{
	fprintf(status ? stderr : stdout, "usage: webshop [--load PERCENT] [--seconds N]\n"
					  "  --load PERCENT  of one core, all threads together: 1 to 200 (60)\n"
					  "  --seconds N     end after N seconds (0: at SIGTERM or SIGINT)\n");
	return status;
}

int main(int argc, char **argv)
{
	long load = 60, seconds = 0;
	struct rusage used;
	sigset_t ends;

	for (int i = 1; i < argc; i += 2) {
		char *end = argv[i];
		long value = i + 1 < argc ? strtol(argv[i + 1], &end, 10) : -1;

		if (!strcmp(argv[i], "--help"))
			return usage(0);
		if (!strcmp(argv[i], "--load") && *end == '\0' && value >= 1 && value <= 200)
			load = value;
		else if (!strcmp(argv[i], "--seconds") && *end == '\0' && value >= 0 && value <= 86400)
			seconds = value;
		else
			return usage(2);
	}

	/* Blocked in all threads: main waits for them, and they interrupt no thread. */
	sigemptyset(&ends);
	sigaddset(&ends, SIGTERM);
	sigaddset(&ends, SIGINT);
	pthread_sigmask(SIG_BLOCK, &ends, NULL);

	stock_catalogue();
	for (size_t i = 0; i < ARRAY_LEN(workers); i++) {
		int error;

		workers[i].share = workers[i].percent / 100 * (double)load / 100;
		error = pthread_create(&workers[i].thread, NULL, worker_main, &workers[i]);
		if (error) {
			fprintf(stderr, "webshop: cannot start thread %s: %s\n", workers[i].name, strerror(error));
			return 1;
		}
	}
	if (seconds) {
		struct timespec patience = { .tv_sec = seconds };

		sigtimedwait(&ends, NULL, &patience);
	} else {
		sigwaitinfo(&ends, NULL);
	}
	atomic_store(&stopping, true);
	for (size_t i = 0; i < ARRAY_LEN(workers); i++)
		pthread_join(workers[i].thread, NULL);

	getrusage(RUSAGE_SELF, &used);
	printf("{\"pid\": %d, \"requests\": %lu, \"cpu_ns\": %llu}\n", getpid(), atomic_load(&requests_served),
	       (used.ru_utime.tv_sec + used.ru_stime.tv_sec) * 1000000000ull +
		       (used.ru_utime.tv_usec + used.ru_stime.tv_usec) * 1000ull);
	return 0;
}
