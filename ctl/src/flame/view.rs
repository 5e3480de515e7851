//! Drawing of the interactive graph: the root at the top, one row for each depth.

use std::fmt::Write as _;

use ratatui::{
    Frame,
    layout::{Constraint, Layout, Rect},
    style::{Color, Modifier, Style, Stylize as _},
    text::{Line, Span},
    widgets::Paragraph,
};

use super::{
    guess,
    model::{Model, Node},
};
use crate::render::{amount, percent};

/// Draws the whole screen and scrolls the model to fit it.
pub(super) fn draw(frame: &mut Frame<'_>, model: &mut Model) {
    let [head, graph, foot, keys] = Layout::vertical([
        Constraint::Length(1),
        Constraint::Fill(1),
        Constraint::Length(2),
        Constraint::Length(1),
    ])
    .areas(frame.area());
    model.height = usize::from(graph.height);
    model.scroll();
    frame.render_widget(header(model), head);
    draw_rows(frame, graph, model);
    frame.render_widget(details(model), foot);
    frame.render_widget(key_line(model), keys);
}

fn header(model: &Model) -> Paragraph<'static> {
    let root = &model.nodes[0];
    let mut text = format!("  {}  {}", model.sample_type, amount(root.total.into(), &model.unit));
    if model.compared {
        let _ = write!(text, "  against {}", amount(root.base_total.into(), &model.unit));
    }
    let mut spans = vec![Span::from(" gannet flame ").reversed().bold(), Span::from(text)];
    if model.typing || !model.search.is_empty() {
        let (count, weight) = model.matched();
        let cursor = if model.typing { "_" } else { "" };
        let found = format!("  /{}{cursor}  {count} found, {}", model.search, percent(weight, root.total));
        spans.push(Span::from(found).fg(Color::Magenta).bold());
    }
    Paragraph::new(Line::from(spans))
}

fn draw_rows(frame: &mut Frame<'_>, area: Rect, model: &mut Model) {
    let rows = model.rows(area.width);
    // No empty rows at the bottom while rows are hidden above.
    model.top = model.top.min(rows.len().saturating_sub(usize::from(area.height)));
    for (line, row) in rows.into_iter().skip(model.top).take(usize::from(area.height)).enumerate() {
        let y = area.y + line as u16;
        for (number, at, width) in row {
            let node = &model.nodes[number];
            let mut style = style(model, node);
            if model.is_match(number) {
                style = Style::new().fg(Color::White).bg(Color::Magenta).bold();
            }
            if number == model.selected {
                style = style.add_modifier(Modifier::REVERSED | Modifier::BOLD);
            }
            // The last column of a wide node stays empty, so that neighbours are distinct.
            let inner = if width > 2 { width - 1 } else { width };
            let name = if node.guessed > 0 { format!("{GUESSED}{}", node.name) } else { node.name.clone() };
            let name: String = if inner > 2 { fit(&name, usize::from(inner)) } else { String::new() };
            let text = format!("{name:<width$}", width = usize::from(inner));
            frame.buffer_mut().set_stringn(area.x + at, y, text, usize::from(inner), style);
        }
    }
}

/// Stands before the name of a frame that rests on a guess.
const GUESSED: char = '~';

/// Shortens a name to `width` characters.
fn fit(name: &str, width: usize) -> String {
    if name.chars().count() <= width {
        return name.to_owned();
    }
    let mut short: String = name.chars().take(width.saturating_sub(1)).collect();
    short.push('…');
    short
}

/// Returns the colour of a node. A function's name decides its warm hue, so that it is the same everywhere; kernel
/// functions are blue. In a comparison red marks a larger share than in the base, green a smaller one.
fn style(model: &Model, node: &Node) -> Style {
    let dark = Style::new().fg(Color::Black);
    if model.compared {
        let share = |part: u64, whole: u64| if whole == 0 { 0.0 } else { part as f64 / whole as f64 };
        let root = &model.nodes[0];
        let change = share(node.total, root.total) - share(node.base_total, root.base_total);
        // A change of 10 percentage points has the full colour.
        let pale = 225 - (change.abs() * 10.0).min(1.0).mul_add(145.0, 0.0) as u8;
        return dark.bg(match change {
            c if c > 0.0005 => Color::Rgb(240, pale, pale),
            c if c < -0.0005 => Color::Rgb(pale, 225, pale),
            _ => Color::Rgb(215, 215, 215),
        });
    }
    let hash = node.name.bytes().fold(5381_u32, |hash, byte| hash.wrapping_mul(33) ^ u32::from(byte));
    let shade = (hash % 64) as u8;
    dark.bg(match (node.kernel, node.name.starts_with('[')) {
        (true, _) => Color::Rgb(110 + shade / 2, 160 + shade / 2, 235),
        (false, true) => Color::Rgb(165 + shade / 4, 165 + shade / 4, 165 + shade / 4),
        (false, false) => Color::Rgb(235 - shade / 6, 120 + shade + shade * 3 / 4, 50 + shade / 2),
    })
}

fn details(model: &Model) -> Paragraph<'static> {
    let (node, root) = (&model.nodes[model.selected], &model.nodes[0]);
    let mut about = node.name.clone();
    for (is, word) in
        [(!node.file.is_empty(), node.file.as_str()), (node.kernel, "kernel"), (node.inlined, "inlined")]
    {
        if is {
            let _ = write!(about, "  {word}");
        }
    }
    if let Some(guessed) = guess(node.guessed, node.weight()) {
        let _ = write!(about, "  {guessed}: by frame pointer, without an unwind table");
    }
    let mut numbers = format!(
        "total {} {}   self {} {}",
        amount(node.total.into(), &model.unit),
        percent(node.total, root.total),
        amount(node.own.into(), &model.unit),
        percent(node.own, root.total),
    );
    if model.compared {
        let _ = write!(
            numbers,
            "   before {} {}",
            amount(node.base_total.into(), &model.unit),
            percent(node.base_total, root.base_total)
        );
    }
    Paragraph::new(vec![Line::from(about).bold(), Line::from(numbers)])
}

fn key_line(model: &Model) -> Paragraph<'static> {
    let keys = if model.typing {
        "type to search   Enter go to match   Esc cancel"
    } else {
        "q quit  arrows move  Enter zoom in  Backspace out  r reset  / search  n N next"
    };
    let mut line = keys.to_owned();
    if model.nodes.iter().any(|node| node.guessed > 0) {
        let _ = write!(line, "   {GUESSED} guessed");
    }
    Paragraph::new(line).dim()
}

#[cfg(test)]
mod tests {
    use ratatui::{Terminal, backend::TestBackend, crossterm::event::KeyCode};

    use super::*;
    use crate::flame::tests::graph;

    fn drawn(model: &mut Model, width: u16, height: u16) -> Terminal<TestBackend> {
        let mut terminal = Terminal::new(TestBackend::new(width, height)).unwrap();
        terminal.draw(|frame| draw(frame, model)).unwrap();
        terminal
    }

    #[test]
    fn each_depth_has_its_row() {
        let mut model = Model::new(graph(false));
        model.key(KeyCode::Down);
        insta::assert_snapshot!(drawn(&mut model, 60, 9).backend(), @r#"
        " gannet flame   samples/count  100                          "
        "all                                                         "
        "serve                                                 idle… "
        "work                                      sys_read          "
        "memcpy                  hash                                "
        "                                                            "
        "serve  app                                                  "
        "total 90 90.00%   self 0 0.00%                              "
        "q quit  arrows move  Enter zoom in  Backspace out  r reset  "
        "#);
    }

    #[test]
    fn guessed_frames_have_a_mark_and_a_legend() {
        let mut graph = graph(false);
        graph.root.children[0].children[0].guessed = 35;
        let mut model = Model::new(graph);
        model.key(KeyCode::Down);
        model.key(KeyCode::Down);
        insta::assert_snapshot!(drawn(&mut model, 90, 9).backend(), @r#"
        " gannet flame   samples/count  100                                                        "
        "all                                                                                       "
        "serve                                                                            idle_lo… "
        "~work                                                          sys_read                   "
        "memcpy                              hash                                                  "
        "                                                                                          "
        "work  app  50.00% guessed: by frame pointer, without an unwind table                      "
        "total 70 70.00%   self 20 20.00%                                                          "
        "q quit  arrows move  Enter zoom in  Backspace out  r reset  / search  n N next   ~ guessed"
        "#);
    }

    #[test]
    fn a_comparison_is_red_for_more_and_green_for_less() {
        let model = Model::new(graph(true));
        let colour = |name: &str| {
            let node = model.nodes.iter().find(|node| node.name == name).unwrap();
            match style(&model, node).bg {
                Some(Color::Rgb(r, g, b)) => (r, g, b),
                other => panic!("{other:?}"),
            }
        };
        let (r, g, _) = colour("memcpy");
        assert!(r > g, "memcpy is new");
        let (r, g, _) = colour("sys_read");
        assert!(g > r, "sys_read is less");
    }

    #[test]
    fn a_screen_of_any_size_is_drawn() {
        let mut model = Model::new(graph(true));
        for (width, height) in [(1, 1), (3, 2), (10, 4), (500, 60)] {
            for key in [KeyCode::Down, KeyCode::Enter, KeyCode::Char('/'), KeyCode::Char('m'), KeyCode::Enter]
            {
                model.key(key);
                drawn(&mut model, width, height);
            }
        }
    }
}
