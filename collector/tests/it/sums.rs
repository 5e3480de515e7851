//! Flame graphs and tables of functions from the tables of sums: equal to those from the profiles, and from sums where that can be.

use std::{fs, path::Path, time::Duration};

use gannet_base::TimeSpan;
use gannet_collector::{Collector, Config, Running};
use gannet_proto::{
    ingest::Batch,
    pprof::{Builder, GUESSED_FROM, Header, Label, LabelValue, Line, LocationId, Mapping, encode, samples},
    query::{
        FlameGraphRequest, FlameGraphResponse, ReadReport, Selection, TopRequest, TopResponse,
        query_service_client::QueryServiceClient,
    },
};
use tonic::{Response, Status, transport::Channel};
use ulid::Ulid;

use crate::{
    deletion,
    support::{Pusher, at, batch, config_with, eventually, labels, metric, now_ms, queries},
    table::{active, files_below, up_to_date, with_table},
};

const MINUTE: u64 = 60_000;
const HOUR: u64 = 60 * MINUTE;

/// A generator of random numbers, the same for each run.
struct Chance(u64);

impl Chance {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Returns a number below `n`.
    fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }

    fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }

    fn of<T: Copy>(&mut self, all: &[T]) -> T {
        all[self.below(all.len() as u64) as usize]
    }
}

type Types = &'static [(&'static str, &'static str)];

const CPU: Types = &[("samples", "count"), ("cpu", "nanoseconds")];
const OFF_CPU: Types = &[("samples", "count"), ("offcpu", "nanoseconds")];
const HEAP: Types = &[
    ("alloc_objects", "count"),
    ("alloc_space", "bytes"),
    ("inuse_objects", "count"),
    ("inuse_space", "bytes"),
];
/// Has rows of the same type as [`CPU`] in the tables of sums.
const CPU_ALONE: Types = &[("cpu", "nanoseconds")];

/// Returns a location that depends only on its number: with inlined functions, without names, of an interpreter, of the kernel.
fn location(builder: &mut Builder, number: u64) -> LocationId {
    let mut chance = Chance(number);
    let files = ["/bin/shop", "/lib/libshop.so", "[kernel.kallsyms]", "[cpython]", "/usr/bin/python3"];
    let file = chance.of(&files);
    let build_id = format!("{:040x}", file.len());
    let mapping = Mapping { start: 0x1000, limit: 0x90_0000, offset: 0x200, file, build_id: &build_id };
    let mapping = (!chance.one_in(9)).then(|| builder.mapping(mapping));
    let names: Vec<String> = (0..chance.of(&[0, 1, 1, 1, 2, 3]))
        .map(|_| {
            if file.ends_with("python3") && chance.one_in(2) {
                "_PyEval_EvalFrameDefault".to_owned()
            } else {
                format!("f{}", chance.below(15))
            }
        })
        .collect();
    let line = |name: &'_ String| (name.clone(), name.len() as i64);
    let named: Vec<(String, i64)> = names.iter().map(line).collect();
    let lines: Vec<Line<'_>> = named
        .iter()
        .map(|(name, number)| Line {
            name,
            system_name: name,
            file: "shop.c",
            line: *number,
            column: 0,
            start_line: 1,
        })
        .collect();
    let address = 0x1000 + number * 16;
    if chance.one_in(8) {
        builder.folded_location(mapping, address, &lines)
    } else {
        builder.location(mapping, address, &lines)
    }
}

fn pprof(chance: &mut Chance, types: Types) -> (Vec<u8>, u64) {
    let header = Header {
        sample_types: types,
        period_type: ("cpu", "nanoseconds"),
        period: 7,
        time_nanos: 5,
        duration_nanos: 6,
    };
    let mut builder = Builder::new(header);
    for _ in 0..chance.below(12) {
        let stack: Vec<LocationId> =
            (0..=chance.below(7)).map(|_| location(&mut builder, chance.below(25))).collect();
        // Some samples are empty in all types or in one.
        let values: Vec<i64> = types.iter().map(|_| chance.of(&[0, 1, 3, 1 << 40])).collect();
        let mut labels = Vec::new();
        if chance.one_in(2) {
            labels.push(Label { key: "thread", value: LabelValue::Str(chance.of(&["a", "b"])) });
        }
        if chance.one_in(3) {
            let from = chance.below(stack.len() as u64 + 1) as i64;
            labels.push(Label { key: GUESSED_FROM, value: LabelValue::Num(from, "") });
        }
        builder.sample(&stack, &values, &labels);
    }
    let profile = builder.finish();
    (encode(&profile), samples(&profile))
}

/// Returns random batches that start in the range.
fn random(chance: &mut Chance, from: u64, until: u64, n: usize) -> Vec<Batch> {
    let make = |_| {
        let service = chance.of(&["a", "a", "b", "c", ""]);
        let types = match service {
            // Mostly alone, so that some minutes have only one kind.
            "c" => chance.of(&[CPU, CPU, CPU, CPU_ALONE, HEAP]),
            _ => chance.of(&[CPU, CPU, OFF_CPU, HEAP]),
        };
        let (pprof, samples) = pprof(chance, types);
        let mut all = labels(&[
            ("service_name", service),
            ("namespace", chance.of(&["", "n", "m"])),
            ("pod", chance.of(&["", "p1", "p2", "p3"])),
            ("node", chance.of(&["n1", "n2"])),
        ]);
        all.retain(|_, value| !value.is_empty());
        Batch {
            batch_id: Ulid::new().to_string(),
            sequence: 1,
            labels: all,
            pprof,
            samples,
            start: Some(at(from + chance.below(until - from))),
            duration: Some(prost_types::Duration { seconds: 10, nanos: 0 }),
            rule_id: "r1".into(),
            ..Batch::default()
        }
    };
    (0..n).map(make).collect()
}

/// Returns the configuration of a store with sums, which queries of any size read.
fn config(data: &Path) -> Config {
    config_with(data, |config| {
        with_table(config);
        config.query.min_summed_profiles = 0;
        // Without a cache, so that each query reads.
        config.query.cache_bytes = 0;
    })
}

struct Asker {
    client: QueryServiceClient<Channel>,
}

impl Asker {
    async fn new(running: &Running) -> Self {
        Self { client: queries(running).await }
    }

    async fn graph(
        &mut self,
        query: &str,
        from: u64,
        until: u64,
        kind: &str,
        max: u32,
    ) -> Result<FlameGraphResponse, Status> {
        let selection = Some(Selection {
            query: query.to_owned(),
            from: Some(at(from)),
            until: Some(at(until)),
            ..Selection::default()
        });
        let request = FlameGraphRequest {
            selection,
            sample_type: kind.to_owned(),
            max_nodes: max,
            flat: true,
            ..FlameGraphRequest::default()
        };
        self.client.flame_graph(request).await.map(Response::into_inner)
    }

    async fn top(&mut self, query: &str, from: u64, until: u64, kind: &str) -> TopResponse {
        let selection = Some(Selection {
            query: query.to_owned(),
            from: Some(at(from)),
            until: Some(at(until)),
            ..Selection::default()
        });
        let request = TopRequest { selection, sample_type: kind.to_owned(), ..TopRequest::default() };
        self.client.top(request).await.unwrap_or_else(|e| panic!("{query}: {e}")).into_inner()
    }

    /// Checks that graph and table of a selection are those of the profiles. Returns what the query of the graph read.
    async fn compare(&mut self, query: &str, from: u64, until: u64, kind: &str, max: u32) -> ReadReport {
        // The same profiles, but no table of sums has the label.
        let raw_query = match query.strip_suffix('}') {
            Some("{") => "{no_such_label=\"\"}".to_owned(),
            Some(start) => format!("{start},no_such_label=\"\"}}"),
            None => panic!("{query}"),
        };
        let graph = self.graph(query, from, until, kind, max).await;
        let raw = self.graph(&raw_query, from, until, kind, max).await;
        let (mut graph, mut raw) = match (graph, raw) {
            (Ok(graph), Ok(raw)) => (graph, raw),
            // No profile has this sample type.
            (Err(error), Err(raw)) if error.code() == raw.code() => return ReadReport::default(),
            (graph, raw) => panic!("{query} {kind}: {graph:?} {raw:?}"),
        };
        let (read, raw_read) = (graph.read.take().unwrap(), raw.read.take().unwrap());
        assert_eq!((raw_read.sum_profiles, raw_read.sum_bytes), (0, 0));
        assert_eq!(read.segment_profiles + read.sum_profiles, raw_read.segment_profiles, "{query} {kind}");
        assert_eq!(graph, raw, "{query} {kind} {from} {until}: {read:?}");
        let mut top = self.top(query, from, until, kind).await;
        let mut raw = self.top(&raw_query, from, until, kind).await;
        let top_read = top.read.take().unwrap();
        raw.read = None;
        assert_eq!(top, raw, "{query} {kind} {from} {until}");
        // An update of the tables may have come in between.
        assert_eq!(top_read.segment_profiles + top_read.sum_profiles, raw_read.segment_profiles);
        read
    }

    /// Compares random selections. Returns the sums of all reports.
    async fn compare_many(&mut self, chance: &mut Chance, from: u64, until: u64, n: usize) -> ReadReport {
        let mut sum = ReadReport::default();
        for _ in 0..n {
            let query = chance.of(&[
                "{service_name=\"a\"}",
                "{service_name=\"c\"}",
                "{service_name=~\"a|b\"}",
                "{service_name!=\"a\"}",
                "{service_name=\"\"}",
                "{}",
                "{service_name=\"a\",pod=\"p1\"}",
                "{namespace=\"n\",pod!=\"p2\"}",
                "{pod=\"\"}",
            ]);
            let types = [
                "",
                "cpu/nanoseconds",
                "cpu/nanoseconds",
                "samples/count",
                "offcpu/nanoseconds",
                "inuse_space/bytes",
            ];
            let (kind, max) = (chance.of(&types), chance.of(&[0, 0, 12]));
            let (a, b) = (from + chance.below(until - from), from + chance.below(until - from));
            let (a, b) = if chance.one_in(2) { (from, until - a % 7919) } else { (a.min(b), a.max(b) + 1) };
            let read = self.compare(query, a, b, kind, max).await;
            sum.segment_profiles += read.segment_profiles;
            sum.sum_profiles += read.sum_profiles;
            sum.sum_bytes += read.sum_bytes;
        }
        sum
    }
}

/// Checks random selections of random profiles: before and after compactions, with profiles that come late, after merges, after a
/// deletion, and after retention.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn answers_from_sums_equal_those_from_profiles() {
    let dir = tempfile::tempdir().unwrap();
    let mut chance = Chance(std::env::var("GANNET_TEST_SEED").map_or(1, |seed| seed.parse().unwrap()));
    let start = |change: &dyn Fn(&mut Config)| {
        let mut config = config(dir.path());
        config.table.merge_files = 4;
        change(&mut config);
        Collector::start(config)
    };
    let running = start(&|_| {}).await.unwrap();
    let mut asker = Asker::new(&running).await;
    let until = now_ms();
    let from = until - 3 * HOUR - 17 * MINUTE;
    let mut summed = ReadReport::default();
    for round in 0..5 {
        let new = random(&mut chance, from, until, if round == 0 { 600 } else { 60 });
        Pusher::open(running.grpc_addr).await.store_all(&new).await;
        // The tables lack some of these profiles now.
        asker.compare_many(&mut chance, from, until, 6).await;
        up_to_date(running.http_addr).await;
        let read = asker.compare_many(&mut chance, from, until, 20).await;
        summed.sum_profiles += read.sum_profiles;
        summed.segment_profiles += read.segment_profiles;
    }
    assert!(summed.sum_profiles > summed.segment_profiles && summed.segment_profiles > 0, "{summed:?}");
    // The tables have the deleted profiles for a while.
    deletion::delete(&running, deletion::of("{service_name=\"a\",pod=\"p2\"}")).await.unwrap();
    asker.compare_many(&mut chance, from, until, 6).await;
    deletion::carried_out(&running).await;
    up_to_date(running.http_addr).await;
    asker.compare_many(&mut chance, from, until, 12).await;
    running.shutdown().await;

    let deleted = [("{service_name=\"a\",pod=\"p3\"}", "now-2h"), ("{service_name=\"b\"}", "now")];
    for (query, until) in deleted {
        let (code, text) =
            crate::export::run("delete", dir.path(), &["--query", query, "--until", until, "--yes"]);
        assert_eq!(code, Some(0), "{text}");
    }
    let running = start(&|_| {}).await.unwrap();
    let mut asker = Asker::new(&running).await;
    asker.compare_many(&mut chance, from, until, 20).await;
    up_to_date(running.http_addr).await;
    let read = asker.compare_many(&mut chance, from, until, 20).await;
    assert!(read.sum_profiles > 0);
    running.shutdown().await;

    // Retention removes the first profiles of an hour, whose sums stay.
    let age = TimeSpan(Duration::from_millis(now_ms() - from - 80 * MINUTE));
    let running = start(&move |config| {
        config.store.retention_age = age;
        config.store.retention_interval = Duration::from_millis(50);
    })
    .await
    .unwrap();
    eventually("retention removes profiles", || async {
        metric(running.http_addr, "gannet_collector_store_retention_removed_profiles_total").await > 50.0
    })
    .await;
    up_to_date(running.http_addr).await;
    running.shutdown().await;
    // Without further removals, which could come between two queries that are compared.
    let running = start(&|_| {}).await.unwrap();
    let mut asker = Asker::new(&running).await;
    let read = asker.compare_many(&mut chance, from + 70 * MINUTE, until, 20).await;
    assert!(read.sum_profiles > 0);
    running.shutdown().await;
}

/// Pushes one profile of ten samples for each of `n` times, from `from` on.
async fn fill(running: &Running, service: &str, from: u64, step: u64, n: u64) {
    let batches: Vec<Batch> =
        (0..n).map(|i| batch(service, from + i * step, &[("main;work", 7), ("main;idle", 3)])).collect();
    Pusher::open(running.grpc_addr).await.store_all(&batches).await;
}

/// Checks that complete minutes come from sums and the edges from profiles, and for each reason that sums do not help that the answer
/// comes from profiles.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn only_complete_and_certain_minutes_come_from_sums() {
    let dir = tempfile::tempdir().unwrap();
    let running = Collector::start(config(dir.path())).await.unwrap();
    let hour = (now_ms() / HOUR - 2) * HOUR;
    fill(&running, "s", hour, 10_000, 60).await;
    up_to_date(running.http_addr).await;
    let mut asker = Asker::new(&running).await;
    let (query, cpu) = ("{service_name=\"s\"}", "cpu/nanoseconds");
    // Nine complete minutes of six profiles, and five profiles at both ends.
    let (from, until) = (hour + 10_000, hour + 10 * MINUTE - 10);
    let read = asker.compare(query, from, until, cpu, 0).await;
    assert_eq!((read.sum_profiles, read.segment_profiles), (48, 11));
    assert!(read.sum_bytes > 0);
    let read = asker.compare(query, hour, hour + HOUR, cpu, 0).await;
    assert_eq!((read.sum_profiles, read.segment_profiles, read.segment_bytes), (60, 0, 0));
    let pod = "{service_name=\"s\",pod=\"\"}";
    let read = asker.compare(pod, hour, hour + HOUR, cpu, 0).await;
    assert_eq!((read.sum_profiles, read.segment_profiles), (60, 0));
    // No complete hour, no complete minute.
    assert_eq!(asker.compare(pod, hour + 1, hour + HOUR, cpu, 0).await.sum_profiles, 0);
    assert_eq!(asker.compare(query, hour + 1, hour + MINUTE, cpu, 0).await.sum_profiles, 0);
    // Another label of the profiles.
    let node = asker.graph("{service_name=\"s\",node=\"n1\"}", hour, hour + HOUR, cpu, 0).await;
    assert_eq!(node.unwrap().read.unwrap().sum_profiles, 0);
    // The labels of samples.
    let selection = Some(Selection {
        query: query.to_owned(),
        from: Some(at(hour)),
        until: Some(at(hour + HOUR)),
        span_id: vec!["00f067aa0ba902b7".to_owned()],
        ..Selection::default()
    });
    let request = FlameGraphRequest { selection, ..FlameGraphRequest::default() };
    let spans = asker.client.flame_graph(request).await.unwrap().into_inner();
    assert_eq!(spans.read.unwrap().sum_profiles, 0);
    let path = format!("/api/v1/merge?query={query}&from={hour}&until={}", hour + HOUR);
    let merged = crate::support::get(running.http_addr, &path).await;
    let read: serde_json::Value = serde_json::from_str(&merged.headers["gannet-read"]).unwrap();
    assert_eq!((&read["segment_profiles"], &read["sum_profiles"]), (&60.into(), &0.into()));
    running.shutdown().await;

    // Tables that are not brought up to date: the first update comes at the start, and no other one.
    let running = Collector::start(config_with(dir.path(), |config| {
        *config = self::config(dir.path());
        config.table.table_interval = TimeSpan(Duration::from_secs(3600));
    }))
    .await
    .unwrap();
    eventually("the first update ends", || async {
        metric(running.http_addr, "gannet_collector_table_updates_total").await >= 1.0
    })
    .await;
    let mut asker = Asker::new(&running).await;
    assert_eq!(asker.compare(query, hour, hour + HOUR, cpu, 0).await.sum_profiles, 60);
    // A late profile; and one of another service, and one with other types.
    fill(&running, "s", hour + 2 * MINUTE + 7, 1, 1).await;
    fill(&running, "t", hour + 3 * MINUTE, 1, 1).await;
    let other = random(&mut Chance(3), hour + 4 * MINUTE, hour + 5 * MINUTE, 40);
    let of = |types: Types| {
        let mut batch = other[0].clone();
        batch.batch_id = Ulid::new().to_string();
        batch.labels = labels(&[("service_name", "s")]);
        (batch.pprof, batch.samples) = pprof(&mut Chance(4), types);
        batch
    };
    let mut pusher = Pusher::open(running.grpc_addr).await;
    pusher.store(of(OFF_CPU)).await;
    let read = asker.compare(query, hour, hour + HOUR, cpu, 0).await;
    assert_eq!((read.sum_profiles, read.segment_profiles), (54, 7));
    // Its rows would be those of both.
    pusher.store(of(CPU_ALONE)).await;
    let read = asker.compare(query, hour, hour + HOUR, cpu, 0).await;
    assert_eq!((read.sum_profiles, read.segment_profiles), (48, 13));
    running.shutdown().await;

    // Few profiles, no tables of sums, and tables that lack a file.
    let table = dir.path().join("table");
    let remove_stacks = || {
        for path in active(&files_below(&table), "stacks") {
            fs::remove_file(table.join(path)).unwrap();
        }
    };
    for change in [
        &(|config: &mut Config| config.query.min_summed_profiles = 100) as &dyn Fn(&mut Config),
        &|config: &mut Config| config.table.table_rollups = false,
        &|_: &mut Config| remove_stacks(),
    ] {
        let running = Collector::start(config_with(dir.path(), |config| {
            *config = self::config(dir.path());
            change(config);
        }))
        .await
        .unwrap();
        let mut asker = Asker::new(&running).await;
        let read = asker.compare(query, hour, hour + HOUR, cpu, 0).await;
        assert_eq!((read.sum_profiles, read.segment_profiles), (0, 61));
        running.shutdown().await;
    }
}
