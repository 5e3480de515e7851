//! State of the interactive graph: the nodes, the selected and zoomed one, and the search.

use gannet_proto::query::FlameNode;
use ratatui::crossterm::event::KeyCode;

use super::Graph;
use crate::render::clean;

/// One function in one call path.
pub(super) struct Node {
    pub(super) name: String,
    pub(super) file: String,
    pub(super) total: u64,
    pub(super) own: u64,
    pub(super) base_total: u64,
    pub(super) kernel: bool,
    pub(super) inlined: bool,
    /// The part of the weight in which the frame rests on a guess.
    pub(super) guessed: u64,
    pub(super) depth: usize,
    /// Index of the parent; the root is its own parent.
    pub(super) parent: usize,
    pub(super) children: Vec<usize>,
}

impl Node {
    /// Returns the value that the width stands for. In a comparison it is the sum of both sides, so that a function that
    /// disappeared still has a width.
    pub(super) fn weight(&self) -> u64 {
        self.total.saturating_add(self.base_total)
    }
}

pub(super) struct Model {
    /// All nodes, each parent before its children. The first one is the root.
    pub(super) nodes: Vec<Node>,
    pub(super) sample_type: String,
    pub(super) unit: String,
    pub(super) compared: bool,
    /// Index of the selected node.
    pub(super) selected: usize,
    /// Index of the node that fills the width.
    pub(super) zoom: usize,
    /// First visible depth.
    pub(super) top: usize,
    /// Rows of the graph when it was last drawn.
    pub(super) height: usize,
    pub(super) search: String,
    /// True while keys go to the search text.
    pub(super) typing: bool,
}

impl Model {
    pub(super) fn new(graph: Graph) -> Self {
        let Graph { root, sample_type, unit, compared, read: _ } = graph;
        let mut nodes: Vec<Node> = Vec::new();
        let mut open = vec![(root, 0, 0)];
        while let Some((node, parent, depth)) = open.pop() {
            let number = nodes.len();
            let FlameNode {
                name,
                file,
                total,
                self_,
                base_total,
                base_self: _,
                children,
                kernel,
                inlined,
                parent: _,
                guessed,
                base_guessed,
            } = node;
            nodes.push(Node {
                name: clean(&name),
                file: clean(&file),
                total,
                own: self_,
                base_total,
                kernel,
                inlined,
                guessed: guessed.saturating_add(base_guessed),
                depth,
                parent,
                children: Vec::new(),
            });
            if number > 0 {
                nodes[parent].children.push(number);
            }
            open.extend(children.into_iter().rev().map(|child| (child, number, depth + 1)));
        }
        Self {
            nodes,
            sample_type,
            unit,
            compared,
            selected: 0,
            zoom: 0,
            top: 0,
            height: 1,
            search: String::new(),
            typing: false,
        }
    }

    /// Handles a key. Returns false if the key quits.
    pub(super) fn key(&mut self, key: KeyCode) -> bool {
        if self.typing {
            self.type_key(key);
            return true;
        }
        match key {
            KeyCode::Char('q') => return false,
            KeyCode::Esc if !self.search.is_empty() => self.search.clear(),
            KeyCode::Esc if self.zoom == 0 => return false,
            KeyCode::Esc | KeyCode::Backspace | KeyCode::Char('u') => self.zoom_out(),
            KeyCode::Char('r') | KeyCode::Home => (self.zoom, self.selected) = (0, 0),
            KeyCode::Enter | KeyCode::Char(' ') => self.zoom = self.selected,
            KeyCode::Up | KeyCode::Char('k') => self.selected = self.nodes[self.selected].parent,
            KeyCode::Down | KeyCode::Char('j') => {
                if let Some(child) = self.nodes[self.selected].children.first() {
                    self.selected = *child;
                }
            }
            KeyCode::Left | KeyCode::Char('h') => self.step(false),
            KeyCode::Right | KeyCode::Char('l') => self.step(true),
            KeyCode::PageUp => {
                for _ in 0..self.height {
                    self.selected = self.nodes[self.selected].parent;
                }
            }
            KeyCode::PageDown => {
                for _ in 0..self.height {
                    self.key(KeyCode::Down);
                }
            }
            KeyCode::Char('/') => {
                self.search.clear();
                self.typing = true;
            }
            KeyCode::Char('n') => self.next_match(true),
            KeyCode::Char('N') => self.next_match(false),
            _ => {}
        }
        if !self.is_below(self.selected, self.zoom) {
            self.zoom = self.selected;
        }
        self.scroll();
        true
    }

    fn type_key(&mut self, key: KeyCode) {
        match key {
            KeyCode::Enter => {
                self.typing = false;
                self.next_match(true);
                self.scroll();
            }
            KeyCode::Esc => {
                self.typing = false;
                self.search.clear();
            }
            KeyCode::Backspace => drop(self.search.pop()),
            KeyCode::Char(c) => self.search.push(c),
            _ => {}
        }
    }

    fn zoom_out(&mut self) {
        self.zoom = self.nodes[self.zoom].parent;
    }

    /// Selects the next visible node of the same depth.
    fn step(&mut self, right: bool) {
        let depth = self.nodes[self.selected].depth;
        let wanted = |number: &usize| self.nodes[*number].depth == depth && self.is_below(*number, self.zoom);
        // Nodes of one depth are ordered by their index.
        let found = if right {
            (self.selected + 1..self.nodes.len()).find(wanted)
        } else {
            (0..self.selected).rev().find(wanted)
        };
        self.selected = found.unwrap_or(self.selected);
    }

    fn is_below(&self, mut number: usize, above: usize) -> bool {
        while self.nodes[number].depth > self.nodes[above].depth {
            number = self.nodes[number].parent;
        }
        number == above
    }

    /// Reports whether the search matches a node.
    pub(super) fn is_match(&self, number: usize) -> bool {
        !self.search.is_empty()
            && self.nodes[number].name.to_lowercase().contains(&self.search.to_lowercase())
    }

    /// Returns the number of matches and their total. A match below another match adds nothing to the total.
    pub(super) fn matched(&self) -> (usize, u64) {
        let (mut count, mut weight, mut inside) = (0, 0_u64, vec![false; self.nodes.len()]);
        for number in 0..self.nodes.len() {
            let within = number > 0 && inside[self.nodes[number].parent];
            let hit = self.is_match(number);
            count += usize::from(hit);
            if hit && !within {
                weight = weight.saturating_add(self.nodes[number].total);
            }
            inside[number] = within || hit;
        }
        (count, weight)
    }

    fn next_match(&mut self, forwards: bool) {
        let count = self.nodes.len();
        let found = (1..=count)
            .map(|i| if forwards { (self.selected + i) % count } else { (self.selected + count - i) % count })
            .find(|number| self.is_match(*number));
        if let Some(number) = found {
            self.selected = number;
            if !self.is_below(number, self.zoom) {
                self.zoom = 0;
            }
        }
    }

    /// Scrolls so that the selected node is visible.
    pub(super) fn scroll(&mut self) {
        let depth = self.nodes[self.selected].depth;
        self.top = self.top.clamp((depth + 1).saturating_sub(self.height.max(1)), depth);
    }

    /// Returns the nodes of each row as (index, first column, width). Ancestors of the zoomed node fill their rows.
    pub(super) fn rows(&self, width: u16) -> Vec<Vec<(usize, u16, u16)>> {
        let mut rows: Vec<Vec<(usize, u16, u16)>> = Vec::new();
        let mut above = vec![self.zoom];
        while let Some(parent) =
            above.last().map(|n| self.nodes[*n].parent).filter(|_| above.last() != Some(&0))
        {
            above.push(parent);
        }
        rows.extend(above.into_iter().rev().map(|number| vec![(number, 0, width)]));
        // Positions are fractions of a column, so that rounding errors do not add up over the depth.
        let mut level = vec![(self.zoom, 0.0, f64::from(width))];
        while !level.is_empty() {
            let mut next = Vec::new();
            for (number, start, span) in level {
                let node = &self.nodes[number];
                let mut at = start;
                for child in &node.children {
                    let share = self.nodes[*child].weight() as f64 / node.weight().max(1) as f64;
                    next.push((*child, at, span * share));
                    at += span * share;
                }
            }
            let row: Vec<_> = next
                .iter()
                .filter_map(|(number, start, span)| {
                    let (first, end) = (start.round() as u16, (start + span).round() as u16);
                    // A node narrower than a column is left out, unless it is selected.
                    let end =
                        if end == first && *number == self.selected { (first + 1).min(width) } else { end };
                    (end > first).then(|| (*number, first, end - first))
                })
                .collect();
            if row.is_empty() {
                break;
            }
            rows.push(row);
            // A node that is too narrow has no visible descendants, except the selected node.
            level = next
                .into_iter()
                .filter(|(number, _, span)| *span >= 0.5 || self.is_below(self.selected, *number))
                .collect();
        }
        rows
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::flame::tests::graph;

    fn model() -> Model {
        Model { height: 10, ..Model::new(graph(false)) }
    }

    fn press(model: &mut Model, keys: &str) {
        for key in keys.chars() {
            assert!(model.key(match key {
                '\n' => KeyCode::Enter,
                '<' => KeyCode::Backspace,
                c => KeyCode::Char(c),
            }));
        }
    }

    fn name(model: &Model) -> &str {
        &model.nodes[model.selected].name
    }

    #[test]
    fn keys_move_through_the_tree() {
        let mut model = model();
        press(&mut model, "jjj");
        assert_eq!(name(&model), "memcpy");
        press(&mut model, "l");
        assert_eq!(name(&model), "hash");
        press(&mut model, "lh");
        assert_eq!(name(&model), "memcpy", "hash is the last of its depth");
        press(&mut model, "kl");
        assert_eq!(name(&model), "sys_read");
        press(&mut model, "kkkk");
        assert_eq!(name(&model), "all");
        assert!(!model.key(KeyCode::Char('q')));
    }

    #[test]
    fn zooming_gives_a_node_the_full_width_and_back() {
        let mut model = model();
        assert_eq!(
            model.rows(100)[1].iter().map(|(_, at, w)| (*at, *w)).collect::<Vec<_>>(),
            [(0, 90), (90, 10)]
        );
        press(&mut model, "jj\n");
        let rows = model.rows(100);
        assert_eq!(rows[2], [(model.selected, 0, 100)]);
        assert_eq!(rows[1].len(), 1, "siblings are hidden");
        press(&mut model, "<");
        assert_eq!(model.nodes[model.zoom].name, "serve");
        press(&mut model, "r");
        assert_eq!((model.zoom, model.selected), (0, 0));
    }

    #[test]
    fn a_search_counts_matches_and_steps_through_them() {
        let mut model = model();
        press(&mut model, "/E\n");
        assert_eq!(model.matched().1, 100, "serve and idle_loop; matches below serve add nothing");
        press(&mut model, "/MEM\n");
        assert_eq!((name(&model), model.matched()), ("memcpy", (1, 40)));
        press(&mut model, "n");
        assert_eq!(name(&model), "memcpy");
        press(&mut model, "/none\n");
        assert_eq!((name(&model), model.matched()), ("memcpy", (0, 0)));
    }

    #[test]
    fn rows_never_overlap_or_leave_the_width() {
        let mut model = model();
        for width in [1, 2, 3, 7, 80] {
            for selected in 0..model.nodes.len() {
                model.selected = selected;
                for row in model.rows(width) {
                    let mut end = 0;
                    for (_, at, span) in row {
                        assert!(at >= end || span == 1, "{width}");
                        end = at + span;
                        assert!(end <= width);
                    }
                }
            }
        }
    }

    #[test]
    fn the_selected_node_stays_visible() {
        let mut model = Model { height: 2, ..model() };
        press(&mut model, "jjj");
        assert_eq!(model.top, 2);
        press(&mut model, "kkk");
        assert_eq!(model.top, 0);
    }
}
