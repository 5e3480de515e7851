//! Draws the screen of `top`.

use std::fmt::Write;

use ratatui::{
    Frame,
    layout::{Constraint, Layout, Rect},
    style::{Color, Modifier, Style, Stylize},
    text::{Line, Span},
    widgets::{Block, Cell, Paragraph, Row as TableRow, Table, TableState},
};

use super::model::{Model, Row, SortBy};

const COLUMNS: [(&str, Constraint); 8] = [
    ("PID", Constraint::Length(8)),
    ("COMMAND", Constraint::Length(16)),
    ("UNIT", Constraint::Fill(2)),
    ("CPU%", Constraint::Length(7)),
    ("SAMPLES", Constraint::Length(8)),
    ("HOTTEST FUNCTION", Constraint::Fill(3)),
    ("RULE", Constraint::Length(14)),
    ("STATE", Constraint::Length(16)),
];

pub(super) fn draw(frame: &mut Frame<'_>, model: &mut Model) {
    let [head, body, losses, keys] = Layout::vertical([
        Constraint::Length(1),
        Constraint::Fill(1),
        Constraint::Length(1),
        Constraint::Length(1),
    ])
    .areas(frame.area());
    frame.render_widget(header(model), head);
    // The heading takes one line.
    model.page = usize::from(body.height.saturating_sub(1));
    if model.open.is_some() {
        draw_process(frame, body, model);
    } else {
        draw_table(frame, body, model);
    }
    frame.render_widget(Paragraph::new(ledger(model)).dim(), losses);
    frame.render_widget(key_line(model), keys);
}

fn header(model: &Model) -> Paragraph<'static> {
    let mut spans = vec![
        Span::from(" gannet top ").reversed().bold(),
        Span::from(format!(
            "  {} processes, sorted by {}{}",
            model.rows().len(),
            model.sort.name(),
            if model.reversed { ", reversed" } else { "" }
        )),
    ];
    if model.editing_filter || !model.filter.is_empty() {
        let cursor = if model.editing_filter { "_" } else { "" };
        spans.push(Span::from(format!("  filter: {}{cursor}", model.filter)).fg(Color::Yellow));
    }
    if model.paused {
        spans.push(Span::from("  paused").fg(Color::Yellow).bold());
    }
    Paragraph::new(Line::from(spans))
}

fn cells(model: &Model, row: &Row) -> [String; 8] {
    let hottest = row.functions.first().map(|function| function.name.clone()).unwrap_or_default();
    [
        format!("{:>7}", row.info.key.tgid),
        row.info.comm.clone(),
        row.info.owner.clone(),
        format!("{:>6.1}", model.percent(row.cpu_ns)),
        format!("{:>7}", row.samples),
        hottest,
        row.info.rule.clone(),
        row.info.state.clone(),
    ]
}

fn draw_table(frame: &mut Frame<'_>, area: Rect, model: &Model) {
    let rows = model.rows();
    let sorted = match model.sort {
        SortBy::Pid => 0,
        SortBy::Comm => 1,
        SortBy::Owner => 2,
        SortBy::Cpu => 3,
        SortBy::Samples => 4,
    };
    let heading = COLUMNS.iter().enumerate().map(|(index, (name, _))| {
        let cell = Cell::from(*name);
        if index == sorted { cell.style(Modifier::UNDERLINED) } else { cell }
    });
    let lines = rows.iter().map(|row| {
        let style = match model.percent(row.cpu_ns) {
            busy if busy >= 80.0 => Style::new().fg(Color::Red),
            busy if busy >= 20.0 => Style::new().fg(Color::Yellow),
            0.0 => Style::new().dim(),
            _ => Style::new(),
        };
        TableRow::new(cells(model, row)).style(style)
    });
    let table = Table::new(lines, COLUMNS.map(|(_, width)| width))
        .header(TableRow::new(heading).bold())
        .row_highlight_style(Modifier::REVERSED);
    let mut state = TableState::new().with_selected(Some(model.selected_index(&rows)));
    frame.render_stateful_widget(table, area, &mut state);
    if rows.is_empty() {
        let text = if model.filter.is_empty() {
            "Waiting for the first samples…"
        } else {
            "No process matches the filter."
        };
        let [_, middle] = Layout::vertical([Constraint::Length(2), Constraint::Fill(1)]).areas(area);
        frame.render_widget(Paragraph::new(text).dim().centered(), middle);
    }
}

fn draw_process(frame: &mut Frame<'_>, area: Rect, model: &Model) {
    let Some(row) = model.open_row() else {
        frame.render_widget(Paragraph::new("This process has exited. Esc goes back.").dim().centered(), area);
        return;
    };
    let [functions, stacks] =
        Layout::horizontal([Constraint::Percentage(42), Constraint::Percentage(58)]).areas(area);
    let share = |part: i64| if row.cpu_ns > 0 { part as f64 * 100.0 / row.cpu_ns as f64 } else { 0.0 };
    let title = format!(
        " {} {} · {:.1} % · {} samples ",
        row.info.key.tgid,
        row.info.comm,
        model.percent(row.cpu_ns),
        row.samples
    );
    let lines = row.functions.iter().skip(model.scroll).map(|function| {
        TableRow::new([
            format!("{:>6.1}", share(function.own_ns)),
            format!("{:>6.1}", share(function.total_ns)),
            function.name.clone(),
        ])
    });
    let widths = [Constraint::Length(7), Constraint::Length(7), Constraint::Fill(1)];
    let table = Table::new(lines, widths)
        .header(TableRow::new(["SELF%", "TOTAL%", "FUNCTION"]).bold())
        .block(Block::bordered().title(title));
    frame.render_widget(table, functions);
    let lines: Vec<Line<'_>> = row
        .tree
        .iter()
        .skip(model.scroll)
        .map(|branch| {
            Line::from(vec![
                Span::from(format!("{:>5.1} ", share(branch.total_ns))).fg(Color::Yellow),
                Span::from("│ ".repeat(branch.depth)).dim(),
                Span::from(branch.name.as_str()),
            ])
        })
        .collect();
    frame.render_widget(
        Paragraph::new(lines).block(
            Block::bordered().title(" Stacks, callers first ").title_bottom(row.info.interpreter.as_str()),
        ),
        stacks,
    );
}

fn ledger(model: &Model) -> String {
    let ledger = &model.ledger;
    let mut text = format!(" samples: {} taken, {} delivered", ledger.taken, ledger.delivered);
    if ledger.pending > 0 {
        let _ = write!(text, ", {} pending", ledger.pending);
    }
    let _ = write!(text, ", {} lost", ledger.lost_total());
    if ledger.unaccounted() != 0 {
        let _ = write!(text, ", {} unaccounted", ledger.unaccounted());
    }
    for (reason, count) in ledger.lost.iter().filter(|(_, count)| **count > 0) {
        let _ = write!(text, " · {} {count}", reason.as_str().replace('_', " "));
    }
    if model.skipped > 0 {
        let _ = write!(text, " · {} windows not shown", model.skipped);
    }
    if let Some(governed) = &model.governed {
        let _ = write!(text, " · {governed}");
    }
    text
}

fn key_line(model: &Model) -> Paragraph<'static> {
    let keys: &[(&str, &str)] = if model.editing_filter {
        &[("Enter", "keep"), ("Esc", "clear")]
    } else if model.open.is_some() {
        &[("↑↓", "scroll"), ("Esc", "back"), ("p", "pause"), ("q", "quit")]
    } else {
        &[
            ("↑↓", "select"),
            ("Enter", "functions and stacks"),
            ("s", "sort"),
            ("r", "reverse"),
            ("/", "filter"),
            ("p", "pause"),
            ("q", "quit"),
        ]
    };
    let spans = keys.iter().flat_map(|(key, what)| {
        [Span::from(format!(" {key} ")).reversed(), Span::from(format!(" {what}  "))]
    });
    Paragraph::new(spans.collect::<Line<'_>>())
}

/// Returns the table as plain text.
pub(super) fn text(model: &Model, most: usize) -> String {
    let rows: Vec<[String; 8]> = model.rows().iter().take(most).map(|row| cells(model, row)).collect();
    let names = COLUMNS.map(|(name, _)| name);
    let widths: Vec<usize> = (0..names.len())
        .map(|column| {
            rows.iter()
                .map(|row| row[column].chars().count())
                .chain([names[column].len()])
                .max()
                .unwrap_or_default()
        })
        .collect();
    let mut text = String::new();
    for row in [names.map(str::to_owned)].iter().chain(&rows) {
        let line: Vec<String> =
            row.iter().zip(&widths).map(|(cell, width)| format!("{cell:<width$}", width = *width)).collect();
        let _ = writeln!(text, "{}", line.join("  ").trim_end());
    }
    let _ = writeln!(text, "\n{}", ledger(model).trim_start());
    text
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use gannet_proto::{
        ledger::{Ledger, LossReason},
        pprof::{Builder, Header, Label, LabelValue, Line as PprofLine},
        profiles::Profile,
    };
    use ratatui::{
        Terminal,
        backend::TestBackend,
        crossterm::event::{KeyCode, KeyEvent, KeyModifiers},
    };

    use super::{
        super::{
            model::Outcome,
            screen,
            snapshot::{ProcessInfo, Snapshot},
        },
        *,
    };
    use crate::model::ProcessKey;

    fn profile(samples: &[(i64, &[&str], i64)]) -> Profile {
        let mut builder = Builder::new(Header {
            sample_types: &[("samples", "count"), ("cpu", "nanoseconds")],
            period_type: ("cpu", "nanoseconds"),
            period: 10_000_000,
            time_nanos: 1,
            duration_nanos: 1_000_000_000,
        });
        for (pid, names, count) in samples {
            let stack: Vec<_> = names
                .iter()
                .map(|name| {
                    let line = PprofLine { name, system_name: name, ..PprofLine::default() };
                    builder.location(None, 0x1000, &[line])
                })
                .collect();
            let pid = Label { key: "pid", value: LabelValue::Num(*pid, "") };
            builder.sample(&stack, &[*count, count * 10_000_000], &[pid]);
        }
        builder.finish()
    }

    fn process(tgid: u32, comm: &str, owner: &str) -> ProcessInfo {
        ProcessInfo {
            key: ProcessKey { tgid, start_boottime_ns: u64::from(tgid) },
            comm: comm.into(),
            owner: owner.into(),
            rule: "all".into(),
            state: "sampled".into(),
            interpreter: String::new(),
        }
    }

    fn snapshot() -> Snapshot {
        let mut ledger = Ledger { taken: 110, delivered: 100, ..Ledger::default() };
        ledger.lose(LossReason::RingFull, 10);
        Snapshot {
            duration: Duration::from_secs(1),
            profiles: vec![
                profile(&[(10, &["fib", "fib", "main"], 60), (10, &["read", "main"], 20)]),
                profile(&[(20, &["poll", "loop"], 5)]),
            ],
            processes: vec![
                process(20, "redis", "redis.service"),
                process(10, "shop", "shop.service"),
                process(30, "sleep", "user"),
            ],
            ledger,
            ..Snapshot::default()
        }
    }

    fn model() -> Model {
        let mut model = Model::default();
        model.update(&snapshot());
        model
    }

    fn screen(model: &mut Model) -> String {
        let mut terminal = Terminal::new(TestBackend::new(110, 12)).unwrap();
        terminal.draw(|frame| draw(frame, model)).unwrap();
        terminal.backend().to_string()
    }

    fn press(model: &mut Model, keys: &[KeyCode]) -> Outcome {
        keys.iter().fold(Outcome::Stay, |_, key| model.key(KeyEvent::new(*key, KeyModifiers::NONE)))
    }

    #[track_caller]
    fn order(model: &Model, expected: &[&str]) {
        let comms: Vec<_> = model.rows().iter().map(|row| row.info.comm.clone()).collect();
        assert_eq!(comms, expected);
    }

    #[test]
    fn skipped_windows_and_lowered_rates_are_shown() {
        let mut model = model();
        assert!(!text(&model, 3).contains("not shown"));
        let governed = Some("rates are lowered to 1/2".to_owned());
        model.update(&Snapshot { skipped: 3, governed, ..snapshot() });
        let text = text(&model, 3);
        assert!(text.contains("3 windows not shown · rates are lowered to 1/2"), "{text}");
    }

    #[test]
    fn rows_are_sorted_by_cpu_and_show_the_hottest_function() {
        let screen = screen(&mut model());
        let line = |comm: &str| {
            screen.lines().find(|line| line.contains(comm)).unwrap_or_else(|| panic!("{screen}"))
        };
        for cell in ["10", "shop.service", "80.0", "80", "fib", "all", "sampled"] {
            assert!(line("shop ").contains(cell), "{cell} in {screen}");
        }
        assert!(line("sleep").contains("0.0"), "{screen}");
        assert!(screen.contains("110 taken, 100 delivered, 10 lost · ring full 10"), "{screen}");
        order(&model(), &["shop", "redis", "sleep"]);
    }

    #[test]
    fn keys_sort_and_reverse() {
        let mut model = model();
        for (keys, expected) in [
            (&[KeyCode::Char('r')][..], ["sleep", "redis", "shop"]),
            (&[KeyCode::Char('r'), KeyCode::Char('s'), KeyCode::Char('s')], ["shop", "redis", "sleep"]),
            (&[KeyCode::Char('r')], ["sleep", "redis", "shop"]),
            (&[KeyCode::Char('r'), KeyCode::Char('>')], ["redis", "shop", "sleep"]),
            (&[KeyCode::Char('>')], ["redis", "shop", "sleep"]),
            (&[KeyCode::Char('<'), KeyCode::Char('<')], ["shop", "redis", "sleep"]),
        ] {
            press(&mut model, keys);
            order(&model, &expected);
        }
    }

    #[test]
    fn a_filter_can_be_typed_and_cleared() {
        let mut model = model();
        press(&mut model, &[KeyCode::Char('/'), KeyCode::Char('q'), KeyCode::Backspace]);
        press(&mut model, &"FIB".chars().map(KeyCode::Char).collect::<Vec<_>>());
        order(&model, &["shop"]);
        assert!(screen(&mut model).contains("filter: FIB_"));
        press(&mut model, &[KeyCode::Enter]);
        assert!(!model.editing_filter);
        order(&model, &["shop"]);
        press(&mut model, &[KeyCode::Esc]);
        order(&model, &["shop", "redis", "sleep"]);
        assert_eq!(press(&mut model, &[KeyCode::Esc]), Outcome::Leave);
    }

    #[test]
    fn a_filter_without_a_match_shows_a_message() {
        let mut model = model();
        model.filter = "nobody".into();
        assert!(screen(&mut model).contains("No process matches the filter."));
        assert!(screen(&mut Model::default()).contains("Waiting for the first samples"));
    }

    #[test]
    fn the_selection_follows_its_process_when_the_order_changes() {
        let mut model = model();
        press(&mut model, &[KeyCode::Down]);
        let selected = |model: &Model| {
            let rows = model.rows();
            rows[model.selected_index(&rows)].info.comm.clone()
        };
        assert_eq!(selected(&model), "redis");
        press(&mut model, &[KeyCode::Char('r')]);
        assert_eq!(selected(&model), "redis");
        press(&mut model, &[KeyCode::End]);
        assert_eq!(selected(&model), "shop");
        press(&mut model, &[KeyCode::Home]);
        assert_eq!(selected(&model), "sleep");
    }

    #[test]
    fn an_open_process_shows_its_functions_and_stacks() {
        let mut model = model();
        press(&mut model, &[KeyCode::Enter]);
        let screen = screen(&mut model);
        let row = model.open_row().unwrap();
        let functions: Vec<_> = row
            .functions
            .iter()
            .map(|f| (f.name.as_str(), f.own_ns / 10_000_000, f.total_ns / 10_000_000))
            .collect();
        // The function is recursive and takes the time once.
        assert_eq!(functions, [("fib", 60, 60), ("read", 20, 20), ("main", 0, 80)]);
        let tree: Vec<_> =
            row.tree.iter().map(|b| (b.depth, b.name.as_str(), b.total_ns / 10_000_000)).collect();
        assert_eq!(tree, [(0, "main", 80), (1, "fib", 60), (2, "fib", 60), (1, "read", 20)]);
        for text in ["80.0 %", "75.0", "│ fib", "│ │ fib", "25.0"] {
            assert!(screen.contains(text), "{text} in {screen}");
        }
        press(&mut model, &[KeyCode::Esc]);
        assert!(model.open.is_none());
    }

    #[test]
    fn an_open_process_shows_its_interpreter() {
        let mut model = model();
        let mut shown = snapshot();
        shown.processes[1].interpreter = "python 3.11.2: ok".into();
        model.update(&shown);
        press(&mut model, &[KeyCode::Enter]);
        assert!(screen(&mut model).contains("python 3.11.2: ok"), "{}", screen(&mut model));
    }

    #[test]
    fn an_open_process_that_exits_is_reported() {
        let mut model = model();
        press(&mut model, &[KeyCode::Enter]);
        model.update(&Snapshot { processes: vec![process(20, "redis", "")], ..snapshot() });
        assert!(screen(&mut model).contains("This process has exited"));
    }

    #[test]
    fn a_paused_table_does_not_change() {
        let mut model = model();
        press(&mut model, &[KeyCode::Char('p')]);
        model.update(&Snapshot::default());
        order(&model, &["shop", "redis", "sleep"]);
        assert!(screen(&mut model).contains("paused"));
        press(&mut model, &[KeyCode::Char(' ')]);
        model.update(&Snapshot::default());
        order(&model, &[]);
    }

    #[test]
    fn q_and_control_c_leave() {
        let mut model = model();
        assert_eq!(press(&mut model, &[KeyCode::Char('q')]), Outcome::Leave);
        let control_c = KeyEvent::new(KeyCode::Char('c'), KeyModifiers::CONTROL);
        model.editing_filter = true;
        assert_eq!(model.key(control_c), Outcome::Leave);
    }

    #[test]
    fn plain_text_shows_the_busiest_processes_and_the_losses() {
        let text = screen::once(&snapshot(), 2);
        let lines: Vec<_> = text.lines().collect();
        assert!(lines[0].starts_with("PID") && lines[0].contains("HOTTEST FUNCTION"), "{text}");
        assert!(lines[1].contains("shop") && lines[2].contains("redis"), "{text}");
        assert_eq!(lines.len(), 5, "{text}");
        assert!(lines[4].contains("10 lost"), "{text}");
    }

    #[test]
    fn a_tiny_terminal_causes_no_panic() {
        for (width, height) in [(1, 1), (3, 2), (20, 4)] {
            let mut model = model();
            for _ in 0..2 {
                let mut terminal = Terminal::new(TestBackend::new(width, height)).unwrap();
                terminal.draw(|frame| draw(frame, &mut model)).unwrap();
                press(&mut model, &[KeyCode::Enter]);
            }
        }
    }
}
