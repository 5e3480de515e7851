//! The engine's thread: conducts the owners of the engine's state. See the [engine](super) for the order that it keeps.

use std::{
    sync::{Arc, mpsc},
    thread,
    time::{Duration, Instant, SystemTime},
};

use gannet_proto::control::RuleError;
use tokio::sync::oneshot;
use ulid::Ulid;

use super::{
    CaptureAnswer, Command, EngineError, EngineOptions, Environment, ReplaceAnswer, Window, WindowSink,
    account::{self, Account, ClosedSamples},
    captures::{CaptureAction, Captures, ManualCapture, RunningCapture},
    effects::{Effect, EffectQueue},
    intake::Closed,
    interpreters::Interpreters,
    limits::{Limits, Switched},
    loss_log::LossLog,
    read_pause::ReadPause,
    reader::{Deciders, Reader},
    repair::Repairs,
    view::{KernelView, ViewSources},
    wake_up::WakeUp,
};
use crate::{
    cgroup,
    conditions::{CaptureStart, NodeConditions, Sensors, WatchScope},
    kernel::{Kernel, KernelError},
    model::{boot_time, boot_time_ns},
    rules::{
        CaptureError, CaptureId, CaptureReason, MANUAL_RULE_ID, PodSelection, RuleBook, RuleId, RuleSource,
        SourceRules,
    },
    tables::UnwindTables,
};

/// How often the worker checks CPUs, losses, budgets and rules that expire.
const HOUSEKEEPING_PERIOD: Duration = Duration::from_secs(1);
/// How long the last window waits for the unwind tables of its samples.
const STOP_TIMEOUT: Duration = Duration::from_secs(8);
/// How long the last window waits for records that the kernel has counted as sent. They are missing then.
const LAST_RECORDS_TIMEOUT: Duration = Duration::from_millis(200);

pub(super) struct Worker {
    node: String,
    kernel: Kernel,
    reader: Reader,
    rules: RuleBook,
    captures: Captures,
    account: Account,
    limits: Limits,
    repairs: Repairs,
    effects: EffectQueue,
    pause: ReadPause,
    wake_up: WakeUp,
    sink: Box<dyn WindowSink>,
    /// When the next rule comes into force or expires.
    next_rule_change: Option<SystemTime>,
    loss_log: LossLog,
    /// The newest window that the sink has.
    last_window: Option<Ulid>,
}

impl Worker {
    pub(super) fn new(
        options: EngineOptions,
        sink: Box<dyn WindowSink>,
        wake_up: WakeUp,
    ) -> Result<Self, EngineError> {
        let EngineOptions { node, kernel, window, caps, deny, budgets, start_labels, tables } = options;
        let (hierarchy, lifecycle) = (kernel.hierarchy, kernel.lifecycle);
        let processes = kernel.processes as usize * 2;
        let mut kernel = Kernel::start(kernel)?;
        let wake = || {
            let wake_up = wake_up.clone();
            move || wake_up.wake()
        };
        let tables = tables.map(|sources| UnwindTables::new(&kernel, sources, wake()));
        let tables = tables.transpose().map_err(EngineError::Start)?;
        let interpreters = tables.is_some().then(|| Interpreters::start(wake()));
        let interpreters = interpreters.transpose().map_err(EngineError::Start)?;
        let sensors = Sensors::start(wake()).map_err(EngineError::Start)?;
        kernel.set_tables(tables.is_some());
        kernel.set_lifecycle(lifecycle);
        kernel.set_sampling(true);
        let mut rules = RuleBook::new(caps);
        rules.set_deny(deny);
        rules.set_condition_support(NodeConditions::probe());
        Ok(Self {
            node,
            reader: Reader::new(hierarchy, processes, start_labels, tables, interpreters, &wake_up, window),
            rules,
            captures: Captures::new(cgroup::mount_of(hierarchy.controller()), Some(sensors), boot_time()),
            account: Account::new(&kernel)?,
            limits: Limits::new(budgets),
            repairs: Repairs::new(Instant::now()),
            effects: EffectQueue::default(),
            pause: ReadPause::default(),
            wake_up,
            sink,
            next_rule_change: None,
            loss_log: LossLog::default(),
            last_window: None,
            kernel,
        })
    }

    pub(super) fn environment(&self) -> Environment {
        let tables = self.reader.unwinding.tables().map(|_| "unwind_tables");
        Environment {
            degraded: self.kernel.degraded().to_vec(),
            features: self.kernel.features().iter().copied().chain(tables).collect(),
            groups: self.reader.processes.groups().map(Arc::clone),
        }
    }

    /// Works until the command to stop.
    pub(super) fn run(&mut self, commands: &mpsc::Receiver<Command>) {
        let mut housekeeping = Instant::now();
        loop {
            self.wait();
            self.catch_up();
            let (reader, mut with) = self.reader();
            reader.read_discovered(&mut with);
            reader.resolve(with.kernel, with.rules, false);
            while let Ok(command) = commands.try_recv() {
                if matches!(command, Command::Stop) {
                    return self.finish();
                }
                // Behind what the kernel has reported by now, however fast the questions follow each other.
                self.catch_up();
                self.execute(command);
                self.carry_out_effects();
            }
            self.check_captures();
            self.carry_out_effects();
            if self.reader.intake.is_full() {
                self.close_window();
            }
            if housekeeping.elapsed() >= HOUSEKEEPING_PERIOD {
                housekeeping = Instant::now();
                self.keep_house();
            }
            if self.repairs.is_period_over(!self.kernel.degraded().is_empty(), Instant::now()) {
                self.effects.add(Effect::Reconcile);
            }
            self.carry_out_effects();
        }
    }

    /// Waits until the kernel or another thread wakes the worker, or its time has come.
    fn wait(&mut self) {
        let opened = self.reader.processes.file_stats().opened;
        let unproven = self.reader.unwinding.backlog().unproven();
        let has_discovered = !self.reader.discovered.is_empty();
        let pause = self.pause.next(opened, unproven, has_discovered, self.reader.intake.time_left());
        self.wake_up.wait(self.kernel.wake_fds(), pause);
    }

    fn reader(&mut self) -> (&mut Reader, Deciders<'_>) {
        let may_begin = self.limits.refusal().is_none();
        let Self { reader, kernel, rules, captures, .. } = self;
        (reader, Deciders { kernel, rules, captures, may_begin })
    }

    fn catch_up(&mut self) {
        let (reader, mut with) = self.reader();
        reader.catch_up(&mut with);
    }

    /// Carries out all effects, each right behind a catch-up.
    fn carry_out_effects(&mut self) {
        while let Some(effect) = self.effects.next() {
            self.catch_up();
            self.carry_out(effect);
        }
    }

    fn carry_out(&mut self, effect: Effect) {
        match effect {
            Effect::AddOffCpu => self.reader.add_off_cpu(&self.kernel, &self.rules),
            Effect::CloseWindow => self.hand_over_window(false),
            Effect::PauseOffCpu => self.reader.off_cpu.pause(),
            Effect::ApplyRules => self.apply_rules_or_log(),
            Effect::SettleRules => self.settle_rules(),
            Effect::Reconcile => {
                let (reader, mut with) = self.reader();
                reader.reconcile(&mut with);
            }
            Effect::BeginCapture(start) => self.begin_capture(&start),
            Effect::BeginManualCapture(manual, answer) => {
                let begun = self.begin_manual_capture(*manual);
                self.answer(answer, begun);
            }
            Effect::AddPreTrigger { rule, scope, capture, begun } => {
                self.add_pre_trigger(&rule, scope, capture, begun);
            }
            Effect::EndDueCaptures => {
                if self.rules.end_due_captures(Instant::now(), SystemTime::now()) {
                    self.apply_rules_or_log();
                }
                self.effects.add(Effect::SettleCaptures);
            }
            Effect::SettleCaptures => self.settle_captures(),
            Effect::FinishCaptures(ended) => self.captures.finish(&ended, self.last_window, boot_time()),
            Effect::Answer(answer) => answer(),
        }
    }

    fn execute(&mut self, command: Command) {
        match command {
            Command::Replace(source, rules, answer) => {
                let replaced = self.replace_rules(source, rules);
                self.answer(answer, replaced);
            }
            Command::Show(show) => show(self.view_sources()),
            Command::Kernel(answer) => {
                let tables = self.reader.unwinding.tables();
                let view = KernelView::read(&mut self.kernel, tables);
                self.answer(answer, view);
            }
            Command::Supply(tables, answer) => {
                self.reader.unwinding.supply(&mut self.kernel, tables);
                self.answer(answer, ());
            }
            Command::Flush(answer) => {
                self.close_window();
                self.answer(answer, ());
            }
            Command::Pods(resolver) => {
                self.rules.enable_pods();
                self.reader.containers.set_resolver(resolver);
                self.apply_rules_or_log();
                self.reader.containers.set_queries(self.rules.slots().pod_queries());
            }
            Command::Select(PodSelection { rules, denied }) => {
                let mut has_changed = self.rules.deny_containers(denied);
                for (rule, containers) in rules {
                    has_changed |= self.rules.select_containers(&rule, containers);
                }
                if has_changed {
                    self.apply_rules_or_log();
                }
            }
            Command::Switch(reason, answer) => {
                self.switch(reason);
                self.answer(answer, ());
            }
            Command::Capture(manual, answer) => {
                if let Some(reason) = self.limits.refusal() {
                    let refused = CaptureError::Governed(reason.to_owned());
                    self.answer(answer, Err(refused));
                } else {
                    self.close_window();
                    self.effects.add(Effect::BeginManualCapture(manual, answer));
                }
            }
            Command::Test(command) => command.execute(&mut self.kernel),
            // The loop handles it.
            Command::Stop => {}
        }
    }

    /// Answers a command behind the effects that were added so far. A client that has gone gets no answer.
    fn answer<T: Send + 'static>(&mut self, answer: oneshot::Sender<T>, value: T) {
        self.effects.add(Effect::Answer(Box::new(move || drop(answer.send(value)))));
    }

    fn view_sources(&self) -> ViewSources<'_> {
        let Self { kernel, reader, rules, captures, account, limits, .. } = self;
        ViewSources { kernel, reader, rules, captures, account, limits }
    }

    fn replace_rules(&mut self, source: RuleSource, rules: SourceRules) -> ReplaceAnswer {
        let errors = self.rules.check(source, &rules.rules);
        if !errors.is_empty() {
            return Err(errors);
        }
        let now = SystemTime::now();
        let former = self.rules.checkpoint();
        let partial = self.rules.replace(source, rules, now);
        if let Err(error) = self.apply_rules(now) {
            self.rules.restore(former);
            let reason = match self.apply_rules(now) {
                Ok(()) => format!("the kernel refused the rules, the former ones stay in force: {error}"),
                Err(again) => format!("the kernel refused the rules: {error}; and the former ones: {again}"),
            };
            return Err(vec![RuleError { field: "rules".into(), reason, ..RuleError::default() }]);
        }
        self.reader.containers.set_queries(self.rules.slots().pod_queries());
        self.effects.add(Effect::SettleCaptures);
        Ok(partial)
    }

    /// Puts the rules as they are now into the kernel. When this returns, the kernel has reported all processes that they
    /// want.
    fn apply_rules(&mut self, now: SystemTime) -> Result<(), KernelError> {
        self.rules.assign_slots(now);
        self.next_rule_change = self.rules.slots().next_change(now);
        // The former rules wanted these; the kernel reports again which processes the new ones want.
        self.reader.discovered.clear();
        self.reader.runtime_files.clear_waiting();
        self.reader.contexts.clear_waiting();
        let rules = self.rules.kernel_rules(now);
        self.kernel.set_rules(&rules)?;
        self.reader.sampled.begin_round();
        self.captures.begin_round();
        self.reader.processes.begin_round(rules.all.rules);
        self.effects.add(Effect::SettleRules);
        Ok(())
    }

    fn apply_rules_or_log(&mut self) {
        if let Err(error) = self.apply_rules(SystemTime::now()) {
            tracing::error!("the kernel refused a change of the rules, the former ones stay: {error}");
        }
    }

    /// Finishes a change of rules: the reader has the reports of all processes that they want.
    fn settle_rules(&mut self) {
        let (reader, mut with) = self.reader();
        reader.settle_marks(&mut with);
        self.captures.set_rules(self.rules.slots().watched(SystemTime::now()), boot_time());
        let (recorded, pre_trigger) = self.rules.slots().recorded();
        self.reader.intake.set_recorded(recorded, pre_trigger);
        self.captures.watch(&self.reader.processes);
    }

    fn keep_house(&mut self) {
        if let Err(error) = self.kernel.follow_cpus() {
            tracing::warn!("{error}");
        }
        self.kernel.write_refused();
        self.reader.processes.tidy();
        self.reader.read_unanswered(&mut self.kernel);
        let unknown = self.kernel.take_unknown_span_keys();
        self.reader.contexts.read_again(&self.reader.processes, &unknown);
        if self.repairs.is_due(&self.kernel, Instant::now()) {
            self.effects.add(Effect::Reconcile);
        }
        self.govern();
        self.captures.watch(&self.reader.processes);
        self.reader.intake.forget_old(boot_time_ns());
        if self.next_rule_change.is_some_and(|at| at <= SystemTime::now()) {
            self.apply_rules_or_log();
        }
        // Slots become free at the end of a window; a rule that waits for one does not wait for the window's time.
        let awaited = self.reader.unwinding.backlog().rules();
        if self.rules.slots().is_window_awaited(Instant::now(), awaited) {
            self.close_window();
        }
    }

    /// Keeps the agent within its budgets.
    fn govern(&mut self) {
        let Some(verdict) = self.limits.check(&self.kernel) else { return };
        // Without captures the recorder is of no use.
        self.reader.intake.switch_recorder(verdict.refuse.is_none());
        self.rules.set_governed(verdict.reason);
        if self.rules.set_rate_divisor(verdict.rate_divisor) {
            self.apply_rules_or_log();
        }
    }

    /// Switches everything off for a reason, or on again.
    fn switch(&mut self, reason: Option<String>) {
        match self.limits.switch(reason) {
            Switched::Off(reason) => {
                tracing::warn!("detached everything from the kernel: {reason}");
                if let Err(error) = self.kernel.detach() {
                    tracing::error!("cannot detach everything from the kernel: {error}");
                }
                self.close_window();
                self.effects.add(Effect::PauseOffCpu);
            }
            Switched::On => {
                tracing::info!("attached everything to the kernel again");
                self.reader.sampled.clear_marks();
                self.reader.off_cpu.resume();
                self.kernel.attach_again();
                self.apply_rules_or_log();
                self.effects.add(Effect::Reconcile);
            }
            Switched::Unchanged => {}
        }
    }

    /// Begins the captures that are due, and ends those whose time is over.
    fn check_captures(&mut self) {
        for action in self.captures.due(boot_time()) {
            self.carry_out_capture(action);
        }
        let clock = Instant::now();
        for action in self.captures.end_due_at_exec(clock, boot_time()) {
            self.carry_out_capture(action);
        }
        if self.rules.slots().next_capture_end().is_some_and(|end| end <= clock) {
            // Before their slots are retired: the threads that have returned since, and those that are still blocked.
            self.effects.add(Effect::AddOffCpu);
            self.effects.add(Effect::EndDueCaptures);
        } else if self.captures.has_ended(&self.rules.slots().running_captures()) {
            self.effects.add(Effect::SettleCaptures);
        }
    }

    fn carry_out_capture(&mut self, action: CaptureAction) {
        match action {
            CaptureAction::Begin(start) => {
                if let Some(reason) = self.limits.refusal() {
                    let refused = CaptureError::Governed(reason.to_owned());
                    self.capture_failed(&start, &refused);
                } else {
                    self.close_window();
                    self.effects.add(Effect::BeginCapture(start));
                }
            }
            CaptureAction::Refuse { key, slot } => {
                self.reader.refuse(key, slot, &mut self.kernel, &self.rules);
            }
            CaptureAction::ShowFaults(faults) => self.rules.set_faults(faults),
        }
    }

    fn begin_capture(&mut self, start: &CaptureStart) {
        let CaptureStart { rule, scope, kind, evidence, duration } = start;
        let now = SystemTime::now();
        let reason = CaptureReason { kind, evidence: evidence.clone() };
        let target = self.captures.target(rule, *scope, &self.rules, &self.reader.processes);
        let begun = self.rules.start_capture(rule, target, reason, Instant::now() + *duration, now);
        match begun.and_then(|capture| self.apply_capture(capture, now)) {
            Ok(capture) => {
                tracing::info!(rule, "a capture has started: {kind} {evidence}");
                self.reader.events.add(now, format!("capture of {rule} started: {kind} {evidence}"));
                let (rule, scope) = (rule.clone(), *scope);
                self.captures.begun(capture, rule.clone(), scope, None);
                self.effects.add(Effect::AddPreTrigger { rule, scope, capture, begun: now });
            }
            Err(error) => self.capture_failed(start, &error),
        }
    }

    fn capture_failed(&mut self, start: &CaptureStart, error: &CaptureError) {
        let CaptureStart { rule, scope, kind, evidence, duration: _ } = start;
        tracing::warn!(rule, "a capture did not start ({kind} {evidence}): {error}");
        self.captures.not_begun(rule, *scope, boot_time());
    }

    fn begin_manual_capture(&mut self, manual: ManualCapture) -> CaptureAnswer {
        let (now, ends) = (SystemTime::now(), Instant::now() + manual.duration);
        let (capture, reason) = manual.to_capture();
        let capture = self.rules.start_manual_capture(manual.matches, capture, reason, ends, now)?;
        let capture = self.apply_capture(capture, now)?;
        let (sender, over) = oneshot::channel();
        self.captures.begun(capture, MANUAL_RULE_ID.into(), WatchScope::Node, Some(sender));
        Ok(RunningCapture { capture: capture.number(), over })
    }

    /// Puts the rules with a new capture into the kernel. If it refuses them, the capture ends at once.
    fn apply_capture(&mut self, capture: CaptureId, now: SystemTime) -> Result<CaptureId, CaptureError> {
        match self.apply_rules(now) {
            Ok(()) => Ok(capture),
            Err(error) => {
                self.rules.end_capture(capture, now);
                Err(CaptureError::Kernel(error.to_string()))
            }
        }
    }

    /// Copies what the flight recorder has from before a capture into its pre-trigger profile.
    fn add_pre_trigger(&mut self, rule: &RuleId, scope: WatchScope, capture: CaptureId, begun: SystemTime) {
        let Some((recorded, length)) = self.rules.slots().pre_trigger(rule) else { return };
        let Some(slot) = self.rules.slots().of_capture(capture) else { return };
        let since_ns = boot_time_ns().saturating_sub(u64::try_from(length.as_nanos()).unwrap_or(u64::MAX));
        let start = begun.checked_sub(length).unwrap_or(begun);
        let Reader { intake, processes, .. } = &mut self.reader;
        let is_wanted = |sample: &_| self.captures.is_at(scope, sample, processes);
        intake.add_pre_trigger((recorded, slot), since_ns, (start, length), is_wanted);
    }

    /// Closes the window that holds the last samples of captures that have ended, and then reports these as over.
    fn settle_captures(&mut self) {
        let running = self.rules.slots().running_captures();
        if !self.captures.has_ended(&running) {
            return;
        }
        self.reader.resolve(&mut self.kernel, &self.rules, false);
        let (slots, awaited) = (self.rules.slots(), self.reader.unwinding.backlog().rules());
        let is_awaited = |capture| slots.of_capture(capture).is_some_and(|slot| awaited >> slot & 1 == 1);
        let ended = self.captures.ended(&running, is_awaited, Instant::now());
        if !ended.is_empty() {
            self.close_window();
            self.effects.add(Effect::FinishCaptures(ended));
        }
    }

    fn close_window(&mut self) {
        self.effects.add(Effect::AddOffCpu);
        self.effects.add(Effect::CloseWindow);
    }

    /// Closes the window at a cut of the [account](super::account). The counters are read first, then the ring buffer.
    fn hand_over_window(&mut self, is_last: bool) {
        let reading = account::read(&self.kernel)
            // The next window has the losses of both.
            .inspect_err(|error| tracing::error!("cannot read the counters of the BPF programs: {error}"))
            .ok();
        self.catch_up();
        let until = Instant::now() + LAST_RECORDS_TIMEOUT;
        while is_last
            && reading.as_ref().is_some_and(|reading| !Account::has_arrived(reading, self.kernel.arrived()))
            && Instant::now() < until
        {
            thread::sleep(Duration::from_millis(1));
            self.catch_up();
        }
        let Reader { intake, processes, unwinding, containers, contexts, .. } = &mut self.reader;
        let Closed { start, duration, flushed } = intake.close(&self.node, processes, &self.rules);
        let backlog = unwinding.backlog();
        processes.next_window(|key| backlog.waiting(key) > 0);
        intake.forget_slots(self.rules.free_retired_slots(Instant::now(), backlog.rules()));
        if self.rules.slots().can_assign() {
            self.effects.add(Effect::ApplyRules);
        }
        containers.next_window();
        let samples = ClosedSamples::of(&flushed, backlog.count(u64::MAX));
        unwinding.next_window(processes);
        contexts.next_window(processes);
        let ledger = self.account.close(&self.kernel, reading.as_ref(), intake.flow(), samples, is_last);
        if ledger.unaccounted() != 0 {
            tracing::error!(
                unaccounted = ledger.unaccounted(),
                "samples are missing without a reason, which is a fault of the agent; report it with this line: {ledger}"
            );
        }
        self.loss_log.write(&ledger, self.account.full_rings());
        if ledger.taken > 0 || ledger.delivered > 0 {
            let id = Ulid::new();
            self.last_window = Some(id);
            self.sink.window(Window { id, start, duration, ledger, profiles: flushed.profiles });
        }
    }

    /// Closes the last window. Its raw samples wait for their unwind tables, within reason.
    fn finish(&mut self) {
        self.kernel.set_sampling(false);
        let until = Instant::now() + STOP_TIMEOUT;
        // Their raw stacks wait like those of others.
        self.catch_up();
        self.effects.add(Effect::AddOffCpu);
        self.carry_out_effects();
        loop {
            self.catch_up();
            let is_over = Instant::now() >= until;
            self.reader.resolve(&mut self.kernel, &self.rules, is_over);
            if self.reader.unwinding.backlog().is_empty() {
                break;
            }
            self.wait();
        }
        self.hand_over_window(true);
    }
}
