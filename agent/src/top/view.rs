//! How `top` looks.

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
    ("STATE", Constraint::Length(9)),
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
    // The heading takes a line.
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
        row.info.place.clone(),
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
        SortBy::Place => 2,
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
        frame.render_widget(Paragraph::new("This process is gone. Esc leads back.").dim().centered(), area);
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
        Paragraph::new(lines).block(Block::bordered().title(" Stacks, callers first ")),
        stacks,
    );
}

fn ledger(model: &Model) -> String {
    let ledger = &model.ledger;
    let mut text = format!(" samples: {} taken, {} delivered", ledger.taken, ledger.delivered);
    if ledger.pending > 0 {
        let _ = write!(text, ", {} on their way", ledger.pending);
    }
    let _ = write!(text, ", {} lost", ledger.lost_total());
    for (reason, count) in ledger.lost.iter().filter(|(_, count)| **count > 0) {
        let _ = write!(text, " · {} {count}", reason.as_str().replace('_', " "));
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
            ("↑↓", "choose"),
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
    Paragraph::new(Line::from_iter(spans))
}

/// The table without a terminal.
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
