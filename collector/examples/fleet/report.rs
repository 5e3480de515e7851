//! Figures of all collectors next to their goals.

use std::{fs, io::Write as _, path::Path};

use serde_json::json;

/// The bound of a figure.
#[derive(Clone, Copy)]
pub(crate) enum Goal {
    AtLeast(f64),
    AtMost(f64),
    None,
}

struct Figure {
    what: String,
    unit: &'static str,
    goal: Goal,
    /// Values of all rounds by collector.
    values: Vec<Vec<f64>>,
}

/// All figures, in the order in which they came first.
pub(crate) struct Report {
    collectors: Vec<String>,
    figures: Vec<Figure>,
}

fn median(values: &[f64]) -> Option<f64> {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    match sorted.len() {
        0 => None,
        n if n % 2 == 0 => Some(f64::midpoint(sorted[middle - 1], sorted[middle])),
        _ => Some(sorted[middle]),
    }
}

fn short(value: f64) -> String {
    match value.abs() {
        size if size >= 100.0 => format!("{value:.0}"),
        size if size >= 10.0 => format!("{value:.1}"),
        size if size >= 0.1 => format!("{value:.2}"),
        _ => format!("{value:.4}"),
    }
}

impl Report {
    pub(crate) fn new(collectors: Vec<String>) -> Self {
        Self { collectors, figures: Vec::new() }
    }

    /// Adds a value of the collector with this index.
    pub(crate) fn add(&mut self, collector: usize, what: &str, unit: &'static str, value: f64, goal: Goal) {
        println!("{:<12} {what}: {} {unit}", self.collectors[collector], short(value));
        let at = self.figures.iter().position(|figure| figure.what == what).unwrap_or_else(|| {
            let values = vec![Vec::new(); self.collectors.len()];
            self.figures.push(Figure { what: what.to_owned(), unit, goal, values });
            self.figures.len() - 1
        });
        self.figures[at].values[collector].push(value);
    }

    /// Prints the medians as a table in Markdown, and writes each figure as a line of JSON. The goals are for all collectors but the
    /// first.
    pub(crate) fn finish(&self, file: &Path) -> anyhow::Result<()> {
        let mut out = fs::File::create(file)?;
        println!(
            "\n| figure | {} | goal | |\n|---|{}---|---|",
            self.collectors.join(" | "),
            "---|".repeat(self.collectors.len())
        );
        for Figure { what, unit, goal, values } in &self.figures {
            let medians: Vec<_> = values.iter().map(|values| median(values)).collect();
            let is_met = |value: f64| match goal {
                Goal::AtLeast(least) => Some(value >= *least),
                Goal::AtMost(most) => Some(value <= *most),
                Goal::None => None,
            };
            let verdicts: Vec<bool> =
                medians.iter().skip(1).flatten().filter_map(|value| is_met(*value)).collect();
            let verdict = match (verdicts.iter().all(|met| *met), verdicts.iter().any(|met| *met)) {
                _ if verdicts.is_empty() => "",
                (true, _) => "met",
                (false, true) => "met by one",
                (false, false) => "missed",
            };
            let goal = match goal {
                Goal::AtLeast(least) => format!(">= {least}"),
                Goal::AtMost(most) => format!("<= {most}"),
                Goal::None => String::new(),
            };
            let cells: Vec<_> = medians.iter().map(|value| value.map_or_else(String::new, short)).collect();
            println!("| {what}, {unit} | {} | {goal} | {verdict} |", cells.join(" | "));
            for (collector, rounds) in
                self.collectors.iter().zip(values).filter(|(_, rounds)| !rounds.is_empty())
            {
                let line = json!({
                    "figure": what, "unit": unit, "collector": collector, "median": median(rounds), "rounds": rounds, "goal": goal,
                });
                writeln!(out, "{line}")?;
            }
        }
        Ok(())
    }
}
