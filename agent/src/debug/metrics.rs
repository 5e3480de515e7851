//! The agent's metrics: declared once, read when a scrape asks, so that no value is counted twice.

use std::{sync::atomic::Ordering::Relaxed, time::SystemTime};

use gannet_base::metrics::{Snapshot, register_process, text};
use gannet_proto::ledger::LossReason;
use prometheus_client::registry::Registry;

use crate::{
    access::{self, AccessStats},
    cgroup::CgroupTreeStats,
    conditions::SuppressedStarts,
    engine::{EngineError, EngineView, InterpreterStats, StackEnds},
    export::{SpoolStats, StreamStats},
    kernel::{Counters, MapFill, Ticks, counters_by_name, lifecycle_counts},
    ledger::Stage,
    node::Node,
    pods::{LeftOut, PodCounts, PodFeedKind},
    process::{FileTableStats, MetadataStats, ProcessStats, left_out_of_surveys, perf_map_files},
    profile::RecorderStats,
    runtimes::{cut_by_limits, cut_searches, read_cpu_time, text_bytes},
    symbols::SymbolizerStats,
    tables::TableStats,
};

gannet_base::metrics! {
    pub METRICS;
    BUILD_INFO = gauge("gannet_agent_build_info", "1, with the version of this agent", ["version"]);

    TICKS = counter("gannet_agent_sampler_ticks_total", "Clock ticks that reached the sampler");
    TICKS_DUE = counter("gannet_agent_sampler_ticks_due_total", "Clock ticks that were due, by the time that the clocks ran");
    TICKS_IDLE = counter("gannet_agent_sampler_ticks_idle_total", "Clock ticks of idle CPUs");
    TICKS_MISSING = counter("gannet_agent_sampler_ticks_missing_total", "Clock ticks that were due and did not come, by reason: `idle` (the kernel did not call the sampler on an idle CPU), `late` (interrupts were off or a hypervisor stopped the CPU, so that one tick came for several), `throttled` (the kernel stopped the clock; see kernel.perf_event_max_sample_rate), `skipped` (another BPF program was active on the CPU), `offline` (the CPU was)", ["reason"]);
    TICKS_SILENT = gauge("gannet_agent_sampler_ticks_silent", "Clock ticks that are due and have not come yet; the next tick shows why");
    RAW_SAMPLES = counter("gannet_agent_sampler_raw_samples_total", "Samples whose stack the agent unwound in user space");
    BPF_COUNTERS = counter("gannet_agent_bpf_events_total", "Every counter of the BPF programs, by the name of its field in gannet.h; the other metrics show what they mean", ["counter"]);
    BPF_OPEN = gauge("gannet_agent_bpf_open_samples", "Samples that a BPF program works on now");
    BPF_MAP_ENTRIES = gauge("gannet_agent_bpf_map_entries", "Entries in use of each BPF map that can fill up; of the ring buffer `events`, bytes that wait for the agent", ["map"]);
    BPF_MAP_CAPACITY = gauge("gannet_agent_bpf_map_capacity", "Entries that each of these BPF maps can have; of the ring buffer, its bytes", ["map"]);
    BPF_MAP_REFUSED = counter("gannet_agent_bpf_map_refused_total", "Failed tries to write the entry of a process into the BPF maps `marks`, `list_frames`, `label_sources` and `thread_contexts`, by map and what was missing: `entries` (the map was full), `memory`, or `other`; the agent tries again", ["map", "missing"]);
    STACKS = counter("gannet_agent_sampler_stacks_total", "Samples by the end of their stacks: complete, truncated, broken, unreadable (a page of the stack was not in memory), or guessed (complete, with a frame that was found by frame pointer without a rule)", ["end"]);
    RATE_DIVISOR = gauge("gannet_agent_governor_rate_divisor", "Factor by which sampling periods are longer than rules ask, to stay within the budgets");

    TAKEN = counter("gannet_agent_samples_taken_total", "Samples that rules asked for, once for each rule");
    DELIVERED = counter("gannet_agent_samples_delivered_total", "Samples that the collector has acknowledged");
    LOST = counter("gannet_agent_samples_lost_total", "Samples lost, by reason", ["reason"]);
    UNACCOUNTED = gauge("gannet_agent_samples_unaccounted", "Taken samples that are neither delivered nor pending nor lost for a reason; must stay 0");
    PENDING = gauge("gannet_agent_samples_pending", "Samples between taken and delivered, by stage", ["stage"]);

    LIFECYCLE_EVENTS = counter("gannet_agent_lifecycle_events_total", "Exec, fork and exit events that the kernel handled, and processes that already ran when the agent started", ["kind"]);
    LIFECYCLE_LOST = counter("gannet_agent_lifecycle_events_lost_total", "Exec, fork and exit events that the agent wanted and did not receive; `refused` is an upper bound and includes ends of threads", ["reason"]);
    MAPPINGS_LOST = counter("gannet_agent_lifecycle_mappings_lost_total", "Executable mappings that the kernel did not report because a buffer was full");
    UNDECODABLE = counter("gannet_agent_lifecycle_events_undecodable_total", "Records of the ring buffer that were no event");

    PROCESSES = gauge("gannet_agent_process_table_processes", "Processes in the agent's table");
    PROCESSES_WAITING = gauge("gannet_agent_process_table_waiting", "Processes that already ran when a rule came for them, and that the agent has not read yet");
    PROCESS_IMAGES = counter("gannet_agent_process_table_images_total", "Images added to the agent's table, by the source of their mappings", ["source"]);
    SERVICES_LEFT_OUT = counter("gannet_agent_services_left_out_total", "Processes whose service name and version the agent left out, because processes gave more than 1,024 different ones at one time");
    PROCESSES_MISSED = counter("gannet_agent_process_table_missed_total", "Processes that exited before the agent could read them");
    PROCESS_RESCANS = counter("gannet_agent_process_table_rescans_total", "Readings of the mappings of a process beyond the first");
    PROCESS_MAPPINGS_CUT = counter("gannet_agent_process_mappings_cut_total", "Executable mappings beyond the 65,536 that the agent reads of one process; code in them has no names, and /debug/processes shows the process");
    PROCESS_PENDING_FULL = counter("gannet_agent_process_table_pending_full_total", "Images whose mappings the agent read from /proc although the kernel reported them, because more than 4,096 processes called execve at one time; /debug/processes shows where mappings come from");
    PROCESSES_PRUNED = counter("gannet_agent_process_table_pruned_total", "Exited processes that left the agent's table early because it was full");
    PROCESS_METADATA = counter("gannet_agent_process_metadata_total", "Look-ups of the metadata of a process, by outcome: `hit`, `read` from /proc, `failed`, `saturated` (the cache was full)", ["outcome"]);
    PROCESS_METADATA_PRUNED = counter("gannet_agent_process_metadata_pruned_total", "Entries of exited or idle processes that left the metadata cache");
    PROCESS_METADATA_BYTES = gauge("gannet_agent_process_metadata_bytes", "Memory of the metadata cache");
    PROCESSES_SAMPLED = gauge("gannet_agent_process_table_sampled", "Live processes that at least one rule wants");
    PROCESSES_RECONCILED = counter("gannet_agent_process_table_reconciled_total", "Processes whose exit the kernel did not report and a scan of /proc found");
    PROCESSES_UNLABELLED = counter("gannet_agent_process_table_unlabelled_total", "Sampled processes that exited, or did not answer, before the agent could read the labels that --label-cmdline, --label-cwd and --label-env ask for");
    SURVEY_LEFT_OUT = counter("gannet_agent_process_survey_left_out_total", "Processes beyond the 65,536 that a preview or an explanation of rules reads");
    PROCESS_TABLE_FULL = counter("gannet_agent_process_table_full_total", "Processes that found no slot in the agent's table; raise --processes");
    PROCESS_MAP_FULL = counter("gannet_agent_process_map_full_total", "Processes that found no slot in the kernel's process map; raise --processes");

    FILES_OPEN = gauge("gannet_agent_files_open", "Files of processes that the agent holds open");
    FILES_OPENED = counter("gannet_agent_files_opened_total", "Files of processes that the agent opened");
    FILES_UNOPENED = counter("gannet_agent_files_unopened_total", "Mappings whose file the agent did not open, by reason: `failed` (no permission, or process and name were gone), `refused` (too many files are open), `unanswered` (file system or process did not answer)", ["reason"]);
    FILES_HUNG = gauge("gannet_agent_files_hung", "Processes and file systems that do not answer now; the log names them");
    FILES_ANSWERED_LATE = counter("gannet_agent_files_hung_answers_total", "Late answers, each of which ends the hang of a process or file system");
    FILES_HUNG_CALLS = counter("gannet_agent_files_hung_calls_total", "Calls on files and processes that got no answer in time, by outcome: `timeout` held a worker, `skipped` were not made", ["outcome"]);

    UNWIND_TABLES = gauge("gannet_agent_unwind_tables", "Unwind tables in the kernel");
    UNWIND_TABLE_BYTES = gauge("gannet_agent_unwind_tables_bytes", "Size of the unwind tables in the kernel");
    UNWIND_TABLES_EVICTED = counter("gannet_agent_unwind_tables_evicted_total", "Unwind tables that left the kernel to make room");
    UNWIND_TABLES_FAILED = counter("gannet_agent_unwind_tables_failed_total", "Files from which the agent could not build an unwind table");

    UNWIND_TABLES_SUPPLIED = gauge("gannet_agent_unwind_tables_supplied", "Supplied unwind tables in force, which take precedence over those of files");
    UNWIND_TABLES_REFUSED = gauge("gannet_agent_unwind_tables_refused", "Files of supplied unwind tables that the agent cannot use; /readyz and /debug/maps say why");
    UNWIND_TABLES_BUDGET = gauge("gannet_agent_unwind_tables_budget_bytes", "Space for unwind tables in the kernel (--table-bytes)");
    UNWIND_TABLES_BUILT = counter("gannet_agent_unwind_tables_built_total", "Unwind tables built, or read from the disk cache");
    UNWIND_RULES = gauge("gannet_agent_unwind_rules", "Rule numbers of the unwind tables in use");
    UNWIND_PROCESSES = gauge("gannet_agent_unwind_processes", "Processes whose stacks the kernel unwinds");
    UNWIND_KEYS = gauge("gannet_agent_unwind_mapping_keys", "Keys of the mapping trie");
    UNWIND_REFUSED = counter("gannet_agent_unwind_refused_total", "Failed tries to load the unwind data of a process into the kernel, by what was missing: `table_bytes`, `rules`, `entries` of a BPF map, `memory`, or `other`", ["missing"]);

    COMMANDS_REFUSED = counter("gannet_agent_engine_refused_commands_total", "Requests that the engine refused because too many waited");
    SYMBOL_PROFILES = counter("gannet_agent_symbols_profiles_total", "Profiles that got names");
    SYMBOL_ADDRESSES = counter("gannet_agent_symbols_addresses_total", "Different addresses in profiles, by whether the agent found a name", ["result"]);
    PERF_MAPS_DROPPED = counter("gannet_agent_perf_maps_dropped_total", "Processes that made code and whose perf map was not held open, because too many others waited; their code has no names after their end");
    SYMBOL_CUT_STACKS = counter("gannet_agent_symbols_cut_stacks_total", "Samples whose stack has more than 1,024 frames with inlined functions; the outermost are cut, and the stack ends with [truncated]");
    SYMBOL_SKIPPED = counter("gannet_agent_symbols_skipped_total", "Addresses whose names exist and were not read, by reason: `large_perf_map` leaves them without a name, with the others a symbol table names their functions", ["reason"]);
    SYMBOL_FILES_FAILED = counter("gannet_agent_symbols_files_failed_total", "Files whose names could not be read, by source of the names", ["source"]);
    SYMBOL_CACHE_BYTES = gauge("gannet_agent_symbols_cache_bytes", "Memory of cached names, kernel symbols and perf maps");

    DEBUGINFO_UPLOADS = counter("gannet_agent_debuginfo_uploads_total", "Files with debug information that the collector wanted: `stored`, or `failed`", ["outcome"]);
    DEBUGINFO_UPLOADED_BYTES = counter("gannet_agent_debuginfo_uploaded_bytes_total", "Bytes of the stored files with debug information");

    RUNTIME_PROCESSES = gauge("gannet_agent_runtimes_processes", "Sampled processes of interpreters, by runtime, version (major and minor number; beyond 64 combinations `other`) and status: `ok`, or why their functions have no names: `not_started`, `unsupported` version, `no_thread_state`, `unreadable`, `too_large`, `implausible`, `unlisted` code (no perf map), `only_native` functions, or switched off because reading `failed` or was `too_costly`; `check --pid` and /debug/processes say more", ["runtime", "version", "status"]);
    RUNTIME_SWITCHED_OFF = counter("gannet_agent_runtimes_switched_off_total", "Processes whose interpreter the agent stopped to read, because a read failed or took too much CPU time");
    RUNTIME_READ_CPU = counter("gannet_agent_runtimes_read_cpu_seconds_total", "CPU time of reading interpreters' memory; beyond 0.5 s at once it takes 10 % of a core at most");
    RUNTIME_READS_DELAYED = counter("gannet_agent_runtimes_reads_delayed_total", "Reads of interpreters' memory that waited, to keep within that CPU time");
    RUNTIME_FUNCTIONS_UNREAD = counter("gannet_agent_runtimes_functions_unread_total", "Interpreted functions without a name, because too many reads waited");
    RUNTIME_FRAMES_UNPROVEN = counter("gannet_agent_runtimes_frames_unproven_total", "Frames of Java and JavaScript without a name, because their code or class may have been replaced between the sample and its reading");
    RUNTIME_CUT = counter("gannet_agent_runtimes_cut_total", "Functions and code of interpreters beyond a limit: `functions` (frames without a name, of functions beyond 16,384 in a process), `texts` (functions without a name: 4 MiB of texts in a process, 16 MiB in all), `copies` (texts of processes that end at once, beyond 8,192 that wait), `needs` (addresses and functions left for a later reading, beyond 2,048 at once), `blocks` (forgotten and read again, beyond 16,384 blocks or 262,144 unwind rows in a process), `all_rows` (blocks not kept, beyond 1,048,576 rows in all), `block_rows` (rows beyond 32,768 in a block, where stacks end), `addresses` and `nameless` functions (forgotten and read again, beyond 4,096 and 32,768 in a process); /debug/processes shows the processes", ["limit"]);
    CUT_SEARCHES = counter("gannet_agent_runtimes_cut_searches_total", "Searches of previews, explanations and /debug/processes that found no interpreter among the first 512 programs and libraries that a process maps, and searched no more");
    RUNTIME_TEXT_BYTES = gauge("gannet_agent_runtimes_text_bytes", "Memory of the names of interpreted functions");

    CAPTURES_HELD_BACK = counter("gannet_agent_captures_held_back_total", "Captures that did not start although their condition held, by reason", ["reason"]);
    RECORDER_SAMPLES = gauge("gannet_agent_recorder_samples", "Samples that the flight recorder holds");
    RECORDER_RECORDED = counter("gannet_agent_recorder_samples_recorded_total", "Samples that the flight recorder took in");
    RECORDER_TAKEN = counter("gannet_agent_recorder_samples_taken_total", "Samples of the flight recorder that captures took");
    RECORDER_BYTES = gauge("gannet_agent_recorder_bytes", "Memory of the flight recorder");
    RECORDER_EVICTED = counter("gannet_agent_recorder_samples_evicted_total", "Samples that the flight recorder dropped before their time because it was full");
    CONDITION_REPORTS_DROPPED = counter("gannet_agent_conditions_reports_dropped_total", "Reports of conditions that arrived faster than the agent handled them");
    CONDITION_UNWATCHED = gauge("gannet_agent_conditions_unwatched", "Conditions of containers beyond the 512 that the agent watches at one time; /debug/rules shows the rules");
    CONDITION_STRAYS = counter("gannet_agent_conditions_stray_samples_total", "Samples for an exec condition whose capture had ended");

    SPOOL_BYTES = gauge("gannet_agent_spool_bytes", "Size of the batches on disk");
    SPOOL_BATCHES = gauge("gannet_agent_spool_batches", "Number of batches on disk");
    SPOOL_CORRUPT = counter("gannet_agent_spool_corrupt_files_total", "Damaged files found in the spool");
    SPOOL_SPLIT = counter("gannet_agent_spool_split_batches_total", "Batches sent in parts, because the collector does not take them as a whole");
    SPOOL_WRITE_ERRORS = counter("gannet_agent_spool_write_errors_total", "Writes to the spool that the file system refused");

    EXPORT_CONNECTED = gauge("gannet_agent_export_connected", "1 while the collector answers on the stream of profiles");
    EXPORT_CONNECTIONS = counter("gannet_agent_export_connections_total", "Connections for profiles, by outcome: `answered` by the collector, or `failed` or broken", ["outcome"]);
    EXPORT_BATCHES = counter("gannet_agent_export_batches_total", "Batches on the stream of profiles: `sent` with retries, `accepted` with duplicates, `duplicate`, `throttled`", ["outcome"]);
    EXPORT_REFUSED = counter("gannet_agent_export_refused_batches_total", "Batches that the collector refused for good, by its code", ["code"]);

    POD_SOURCE = gauge("gannet_agent_pods_source", "1 for the source that pod metadata comes from", ["source"]);
    POD_UPDATES = counter("gannet_agent_pods_updates_total", "Lists and changes of pods received");
    POD_ERRORS = counter("gannet_agent_pods_errors_total", "Errors of pod sources");
    POD_LAST_UPDATE = gauge("gannet_agent_pods_last_update_timestamp_seconds", "Time of the last list or change of pods, in seconds since 1970");
    POD_CONTAINERS = gauge("gannet_agent_pods_containers", "Containers whose pod is known");
    POD_UNKNOWN = gauge("gannet_agent_pods_unknown_containers", "Containers whose pod is not known, by state of the search", ["state"]);
    POD_REFUSED = counter("gannet_agent_pods_refused_total", "Pods beyond the 10,000 that the agent stores, counted in each list");
    POD_LEFT_OUT = counter("gannet_agent_pods_left_out_total", "Parts of pods that the agent does not keep, counted once for each pod: `labels` and `containers` beyond 512; /debug/pods shows the pods", ["part"]);
    POD_POSTPONED = counter("gannet_agent_pods_postponed_containers_total", "Times that a container in no pod's control group was seen while 256 others waited until the agent reads who started them; it is read when it is seen again");
    CGROUPS_LEFT_OUT = gauge("gannet_agent_cgroups_left_out", "Control groups that rules by pod do not reach, by limit: `count` (16,384 groups) or `levels` (32 below the root); groups below these are not counted", ["limit"]);
    CGROUPS_UNWATCHED = counter("gannet_agent_cgroups_unwatched_total", "Control groups that the agent does not follow, because there are more than 16,384 or fs.inotify.max_user_watches is reached; it sees new groups below them at the next scan of all");
    CUT_LABELS = counter("gannet_agent_pods_cut_label_values_total", "Label values of profiles above 2,048 bytes, which the agent cut with a mark because a collector refuses them");

    CONNECTED = gauge("gannet_agent_control_connected", "1 while the control stream to the collector is up");
    DEGRADED = gauge("gannet_agent_health_degraded_parts", "Parts of the agent that work with limits; /readyz names them");
}

/// Returns the text of a scrape.
pub(super) async fn render(node: &Node) -> Result<String, EngineError> {
    let engine = node.engine.view().await?;
    let kernel = node.engine.kernel_view().await?;
    let mut snapshot = Snapshot::default();
    snapshot.add_labelled(&BUILD_INFO, [gannet_proto::VERSION], true);
    add_samples(&mut snapshot, node);
    add_engine(&mut snapshot, &engine);
    add_maps(&mut snapshot, &kernel.maps);
    add_access(&mut snapshot);
    snapshot.add(&COMMANDS_REFUSED, node.engine.refused_commands());
    snapshot.add(&UNWIND_TABLES_REFUSED, node.supplied().refused.len());
    snapshot.add(&RUNTIME_TEXT_BYTES, text_bytes());
    for (limit, count) in cut_by_limits() {
        snapshot.add_labelled(&RUNTIME_CUT, [limit.name()], count);
    }
    snapshot.add(&CUT_SEARCHES, cut_searches());
    snapshot.add(&RUNTIME_READ_CPU, read_cpu_time().as_secs_f64());
    add_symbols(&mut snapshot, &node.symbols);
    add_spool(&mut snapshot, &node.spool);
    add_export(&mut snapshot, &node.stream);
    add_pods(&mut snapshot, node);
    add_groups(&mut snapshot, node);
    snapshot.add(&CONNECTED, node.connected.load(Relaxed));
    snapshot.add(&DEGRADED, node.degraded().len());
    let mut registry = Registry::default();
    registry.register_collector(Box::new(snapshot));
    register_process(&mut registry);
    Ok(text(&registry))
}

// The functions below take structures of counts apart field by field: a count that is added to one of them does not compile
// before it has a metric here, or a reason for having none.

fn add_samples(snapshot: &mut Snapshot, node: &Node) {
    let account = node.ledger.account_now();
    let ledger = account.to_ledger();
    snapshot.add(&TICKS, ledger.ticks);
    snapshot.add(&TAKEN, ledger.taken);
    snapshot.add(&DELIVERED, ledger.delivered);
    for reason in LossReason::ALL {
        let lost = ledger.lost.get(&reason).copied().unwrap_or(0);
        snapshot.add_labelled(&LOST, [&reason.to_string()], lost);
    }
    snapshot.add(&UNACCOUNTED, ledger.unaccounted() as f64);
    for stage in Stage::ALL {
        snapshot.add_labelled(&PENDING, [stage.as_str()], account.at_stage(stage));
    }
}

fn add_engine(snapshot: &mut Snapshot, engine: &EngineView) {
    let EngineView {
        processes,
        sampled_processes,
        process_stats,
        file_stats,
        metadata_stats,
        discovered_waiting,
        counters,
        ticks,
        undecodable_events,
        mappings_lost,
        refused_entries,
        unwind_tables,
        interpreters,
        services_left_out,
        suppressed_captures,
        recorder,
        sensor_reports_dropped,
        unwatched_conditions,
        stray_samples,
        rate_divisor,
        stack_ends,
        // States of rules, texts, and the account of samples, which `add_samples` takes from the node.
        rules: _,
        rule_faults: _,
        governed: _,
        ledger: _,
        events: _,
    } = engine;
    if let Some(counters) = counters {
        add_counters(snapshot, counters);
    }
    if let Some(ticks) = ticks {
        add_ticks(snapshot, ticks);
    }
    add_stack_ends(snapshot, *stack_ends);
    snapshot.add(&UNDECODABLE, *undecodable_events);
    snapshot.add(&MAPPINGS_LOST, *mappings_lost);
    for refused in refused_entries {
        for (missing, count) in refused.by_name() {
            snapshot.add_labelled(&BPF_MAP_REFUSED, [refused.map, missing], count);
        }
    }
    if let Some(tables) = unwind_tables {
        add_tables(snapshot, *tables);
    }
    add_interpreters(snapshot, interpreters);
    let SuppressedStarts { cooldown, max_concurrent, budget } = *suppressed_captures;
    for (reason, count) in [("cooldown", cooldown), ("max_concurrent", max_concurrent), ("budget", budget)] {
        snapshot.add_labelled(&CAPTURES_HELD_BACK, [reason], count);
    }
    let RecorderStats { recorded, evicted, taken, held, bytes } = *recorder;
    snapshot.add(&RECORDER_RECORDED, recorded);
    snapshot.add(&RECORDER_TAKEN, taken);
    snapshot.add(&RECORDER_SAMPLES, held);
    snapshot.add(&RECORDER_BYTES, bytes);
    snapshot.add(&RECORDER_EVICTED, evicted);
    snapshot.add(&CONDITION_REPORTS_DROPPED, *sensor_reports_dropped);
    snapshot.add(&CONDITION_UNWATCHED, *unwatched_conditions);
    snapshot.add(&CONDITION_STRAYS, *stray_samples);
    snapshot.add(&RATE_DIVISOR, *rate_divisor);
    snapshot.add(&SERVICES_LEFT_OUT, *services_left_out);
    snapshot.add(&PROCESSES, *processes);
    snapshot.add(&PROCESSES_SAMPLED, *sampled_processes);
    snapshot.add(&PROCESSES_WAITING, *discovered_waiting);
    add_processes(snapshot, *process_stats);
    add_metadata(snapshot, *metadata_stats);
    add_files(snapshot, *file_stats);
}

fn add_interpreters(snapshot: &mut Snapshot, stats: &InterpreterStats) {
    let InterpreterStats { processes, switched_off, delayed, unread, unproven } = stats;
    for ((runtime, version, status), count) in processes {
        snapshot.add_labelled(&RUNTIME_PROCESSES, [runtime, version.as_str(), status], *count);
    }
    snapshot.add(&RUNTIME_SWITCHED_OFF, *switched_off);
    snapshot.add(&RUNTIME_READS_DELAYED, *delayed);
    snapshot.add(&RUNTIME_FUNCTIONS_UNREAD, *unread);
    snapshot.add(&RUNTIME_FRAMES_UNPROVEN, *unproven);
}

fn add_counters(snapshot: &mut Snapshot, counters: &Counters) {
    let (all, open) = counters_by_name(counters);
    for (name, count) in &all {
        snapshot.add_labelled(&BPF_COUNTERS, [name], *count);
    }
    snapshot.add(&BPF_OPEN, open);
    let kinds = lifecycle_counts(counters);
    for (kind, counts) in kinds {
        snapshot.add_labelled(&LIFECYCLE_EVENTS, [kind], counts.seen);
    }
    for (reason, count) in [
        ("ring_full", kinds.iter().map(|(_, counts)| counts.lost_ring_full).sum::<u64>()),
        ("rate", kinds.iter().map(|(_, counts)| counts.lost_rate).sum()),
        ("refused", kinds.iter().map(|(_, counts)| counts.skipped).sum()),
    ] {
        snapshot.add_labelled(&LIFECYCLE_LOST, [reason], count);
    }
    snapshot.add(&RAW_SAMPLES, counters.raw);
    snapshot.add(&PROCESS_MAP_FULL, counters.procs_full);
}

fn add_ticks(snapshot: &mut Snapshot, ticks: &Ticks) {
    // TICKS has those that came. The others are in `missing`.
    let Ticks {
        due,
        idle,
        silent,
        fired: _,
        late: _,
        throttled: _,
        idle_uncalled: _,
        skipped: _,
        offline: _,
    } = *ticks;
    snapshot.add(&TICKS_DUE, due);
    snapshot.add(&TICKS_IDLE, idle);
    for (reason, count) in ticks.missing().into_iter().filter(|(reason, _)| *reason != "silent") {
        snapshot.add_labelled(&TICKS_MISSING, [reason], count);
    }
    snapshot.add(&TICKS_SILENT, silent);
}

fn add_stack_ends(snapshot: &mut Snapshot, ends: StackEnds) {
    let StackEnds { complete, truncated, broken, unreadable, guessed } = ends;
    for (end, count) in [
        ("complete", complete),
        ("truncated", truncated),
        ("broken", broken),
        ("unreadable", unreadable),
        ("guessed", guessed),
    ] {
        snapshot.add_labelled(&STACKS, [end], count);
    }
}

fn add_tables(snapshot: &mut Snapshot, tables: TableStats) {
    let TableStats {
        made,
        failed,
        supplied,
        resident,
        resident_bytes,
        budget_bytes,
        evicted,
        rules,
        processes,
        keys,
        refused,
    } = tables;
    snapshot.add(&UNWIND_TABLES, resident);
    snapshot.add(&UNWIND_TABLE_BYTES, resident_bytes);
    snapshot.add(&UNWIND_TABLES_BUDGET, budget_bytes);
    snapshot.add(&UNWIND_TABLES_EVICTED, evicted);
    snapshot.add(&UNWIND_TABLES_FAILED, failed);
    snapshot.add(&UNWIND_TABLES_SUPPLIED, supplied);
    snapshot.add(&UNWIND_TABLES_BUILT, made);
    snapshot.add(&UNWIND_RULES, rules);
    snapshot.add(&UNWIND_PROCESSES, processes);
    snapshot.add(&UNWIND_KEYS, keys);
    // RefusalCounts takes itself apart.
    for (missing, count) in refused.by_name() {
        snapshot.add_labelled(&UNWIND_REFUSED, [missing], count);
    }
}

fn add_maps(snapshot: &mut Snapshot, maps: &[MapFill]) {
    let filling = || maps.iter().filter_map(|map| map.entries.map(|entries| (map, entries)));
    for (map, entries) in filling() {
        snapshot.add_labelled(&BPF_MAP_ENTRIES, [&map.name], entries);
    }
    for (map, _) in filling() {
        snapshot.add_labelled(&BPF_MAP_CAPACITY, [&map.name], map.capacity);
    }
}

fn add_processes(snapshot: &mut Snapshot, stats: ProcessStats) {
    let ProcessStats {
        reported,
        loaded,
        missed,
        rescans,
        cut_mappings,
        pending_full,
        pruned,
        saturated,
        reconciled,
        unlabelled,
    } = stats;
    for (source, count) in [("kernel", reported), ("proc", loaded)] {
        snapshot.add_labelled(&PROCESS_IMAGES, [source], count);
    }
    snapshot.add(&PROCESSES_MISSED, missed);
    snapshot.add(&PROCESS_RESCANS, rescans);
    snapshot.add(&PROCESS_MAPPINGS_CUT, cut_mappings);
    snapshot.add(&PROCESS_PENDING_FULL, pending_full);
    snapshot.add(&PROCESSES_PRUNED, pruned);
    snapshot.add(&PROCESSES_RECONCILED, reconciled);
    snapshot.add(&PROCESSES_UNLABELLED, unlabelled);
    snapshot.add(&SURVEY_LEFT_OUT, left_out_of_surveys());
    snapshot.add(&PROCESS_TABLE_FULL, saturated);
}

fn add_metadata(snapshot: &mut Snapshot, stats: MetadataStats) {
    let MetadataStats { hits, loads, failed, pruned, saturated, bytes } = stats;
    for (outcome, count) in [("hit", hits), ("read", loads), ("failed", failed), ("saturated", saturated)] {
        snapshot.add_labelled(&PROCESS_METADATA, [outcome], count);
    }
    snapshot.add(&PROCESS_METADATA_PRUNED, pruned);
    snapshot.add(&PROCESS_METADATA_BYTES, bytes);
}

fn add_files(snapshot: &mut Snapshot, stats: FileTableStats) {
    let FileTableStats { open, opened, failed, refused, unanswered } = stats;
    snapshot.add(&FILES_OPEN, open);
    snapshot.add(&FILES_OPENED, opened);
    for (reason, count) in [("failed", failed), ("refused", refused), ("unanswered", unanswered)] {
        snapshot.add_labelled(&FILES_UNOPENED, [reason], count);
    }
}

fn add_access(snapshot: &mut Snapshot) {
    let AccessStats { hung, timeouts, skipped, answered } = access::node().stats();
    snapshot.add(&FILES_HUNG, hung);
    snapshot.add(&FILES_ANSWERED_LATE, answered);
    snapshot.add_labelled(&FILES_HUNG_CALLS, ["timeout"], timeouts);
    snapshot.add_labelled(&FILES_HUNG_CALLS, ["skipped"], skipped);
    snapshot.add(&PERF_MAPS_DROPPED, perf_map_files().dropped());
}

fn add_symbols(snapshot: &mut Snapshot, stats: &SymbolizerStats) {
    let SymbolizerStats {
        profiles,
        named,
        unnamed,
        cut_stacks,
        unusable_tables,
        unusable_debug_info,
        cached_bytes,
        skipped: _,
        debug_files_uploaded,
        debug_bytes_uploaded,
        debug_uploads_failed,
    } = stats;
    snapshot.add(&SYMBOL_PROFILES, profiles.load(Relaxed));
    for (result, count) in [("named", named), ("unnamed", unnamed)] {
        snapshot.add_labelled(&SYMBOL_ADDRESSES, [result], count.load(Relaxed));
    }
    for (reason, count) in stats.skipped() {
        snapshot.add_labelled(&SYMBOL_SKIPPED, [reason.name()], count);
    }
    for (source, count) in [("symbol_table", unusable_tables), ("debug_info", unusable_debug_info)] {
        snapshot.add_labelled(&SYMBOL_FILES_FAILED, [source], count.load(Relaxed));
    }
    snapshot.add(&SYMBOL_CUT_STACKS, cut_stacks.load(Relaxed));
    snapshot.add(&SYMBOL_CACHE_BYTES, cached_bytes.load(Relaxed));
    for (outcome, count) in [("stored", debug_files_uploaded), ("failed", debug_uploads_failed)] {
        snapshot.add_labelled(&DEBUGINFO_UPLOADS, [outcome], count.load(Relaxed));
    }
    snapshot.add(&DEBUGINFO_UPLOADED_BYTES, debug_bytes_uploaded.load(Relaxed));
}

fn add_spool(snapshot: &mut Snapshot, stats: &SpoolStats) {
    let SpoolStats { bytes, batches, corrupt_files, write_errors, split_batches } = stats;
    snapshot.add(&SPOOL_BYTES, bytes.load(Relaxed));
    snapshot.add(&SPOOL_BATCHES, batches.load(Relaxed));
    snapshot.add(&SPOOL_CORRUPT, corrupt_files.load(Relaxed));
    snapshot.add(&SPOOL_SPLIT, split_batches.load(Relaxed));
    snapshot.add(&SPOOL_WRITE_ERRORS, write_errors.load(Relaxed));
}

fn add_export(snapshot: &mut Snapshot, stats: &StreamStats) {
    let StreamStats { connected, connects, failures, sent, accepted, duplicates, throttled, refused } = stats;
    snapshot.add(&EXPORT_CONNECTED, connected.load(Relaxed));
    for (outcome, count) in [("answered", connects), ("failed", failures)] {
        snapshot.add_labelled(&EXPORT_CONNECTIONS, [outcome], count.load(Relaxed));
    }
    for (outcome, count) in
        [("sent", sent), ("accepted", accepted), ("duplicate", duplicates), ("throttled", throttled)]
    {
        snapshot.add_labelled(&EXPORT_BATCHES, [outcome], count.load(Relaxed));
    }
    for (code, count) in &*refused.lock() {
        snapshot.add_labelled(&EXPORT_REFUSED, [code], *count);
    }
}

fn add_pods(snapshot: &mut Snapshot, node: &Node) {
    let status = node.pods.status();
    for kind in PodFeedKind::ALL {
        snapshot.add_labelled(&POD_SOURCE, [kind.as_str()], status.kind == Some(kind));
    }
    snapshot.add(&POD_UPDATES, status.updates);
    snapshot.add(&POD_ERRORS, status.errors);
    if let Some(since) = status.last_update.and_then(|at| at.duration_since(SystemTime::UNIX_EPOCH).ok()) {
        snapshot.add(&POD_LAST_UPDATE, since.as_secs_f64());
    }
    let PodCounts { containers, requested, unlisted, refused, left_out, cut_labels, postponed } =
        node.pods.counts();
    snapshot.add(&POD_CONTAINERS, containers);
    for (state, count) in [("asked_for", requested), ("in_no_list", unlisted)] {
        snapshot.add_labelled(&POD_UNKNOWN, [state], count);
    }
    snapshot.add(&POD_REFUSED, refused);
    let LeftOut { labels, containers } = left_out;
    for (part, count) in [("labels", labels), ("containers", containers)] {
        snapshot.add_labelled(&POD_LEFT_OUT, [part], count);
    }
    snapshot.add(&CUT_LABELS, cut_labels);
    snapshot.add(&POD_POSTPONED, postponed);
}

fn add_groups(snapshot: &mut Snapshot, node: &Node) {
    let stats = node.engine.groups().map(|groups| groups.stats()).unwrap_or_default();
    let CgroupTreeStats { beyond_count, beyond_levels, unwatched } = stats;
    for (limit, count) in [("count", beyond_count), ("levels", beyond_levels)] {
        snapshot.add_labelled(&CGROUPS_LEFT_OUT, [limit], count);
    }
    snapshot.add(&CGROUPS_UNWATCHED, unwatched);
}

#[cfg(test)]
mod tests {
    use gannet_base::metrics::problems;

    use super::*;

    #[test]
    fn each_metric_follows_the_conventions() {
        assert_eq!(problems(METRICS), Vec::<String>::new());
        for metric in METRICS {
            assert!(metric.name.starts_with("gannet_agent_"), "{}", metric.name);
        }
    }
}
