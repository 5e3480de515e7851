//! Sums of stacks from the tables as a profile.

use std::collections::HashMap;

use gannet_proto::pprof::{Builder, Label, LabelValue, Line, LocationId, Mapping};

/// One stack with one label set.
pub(crate) struct StackSum {
    pub(crate) frames: Vec<i64>,
    /// 0: no labels.
    pub(crate) labels: i64,
    pub(crate) values: Vec<i64>,
}

/// A frame of the tables.
pub(crate) struct TableFrame {
    pub(crate) line: Option<[String; 3]>,
    pub(crate) numbers: [i64; 3],
    pub(crate) inlined: bool,
    pub(crate) address: u64,
    pub(crate) mapping: Option<[String; 2]>,
    pub(crate) range: [u64; 3],
    pub(crate) folded: bool,
}

impl TableFrame {
    fn line(&self) -> Option<Line<'_>> {
        let [name, system_name, file] = self.line.as_ref()?;
        let [line, column, start_line] = self.numbers;
        Some(Line { name, system_name, file, line, column, start_line })
    }

    fn mapping(&self) -> Option<Mapping<'_>> {
        let [file, build_id] = self.mapping.as_ref()?;
        let [start, limit, offset] = self.range;
        Some(Mapping { start, limit, offset, file, build_id })
    }
}

/// A label set of the tables.
pub(crate) struct LabelSet {
    pub(crate) texts: Vec<(String, String)>,
    pub(crate) numbers: Vec<(String, i64)>,
    pub(crate) units: HashMap<String, String>,
}

impl LabelSet {
    fn labels(&self) -> Vec<Label<'_>> {
        let texts = self.texts.iter().map(|(key, text)| Label { key, value: LabelValue::Str(text) });
        let unit = |key: &String| self.units.get(key).map_or("", String::as_str);
        let numbers = self.numbers.iter();
        let numbers = numbers.map(|(key, number)| Label { key, value: LabelValue::Num(*number, unit(key)) });
        texts.chain(numbers).collect()
    }
}

/// Adds the sums to a profile.
pub(crate) fn fill(
    builder: &mut Builder,
    sums: &[StackSum],
    frames: &HashMap<i64, TableFrame>,
    labels: &HashMap<i64, LabelSet>,
) {
    // Most locations are one frame.
    let mut known: HashMap<Vec<i64>, LocationId> = HashMap::new();
    let (mut stack, mut run) = (Vec::new(), Vec::new());
    for StackSum { frames: ids, labels: set, values } in sums {
        stack.clear();
        run.clear();
        for id in ids {
            let Some(frame) = frames.get(id) else { continue };
            run.push(*id);
            // The next frame is the function into which this one is inlined, at the same location.
            if frame.inlined {
                continue;
            }
            let location = known.get(&run).copied().unwrap_or_else(|| {
                let lines: Vec<Line<'_>> =
                    run.iter().filter_map(|id| frames.get(id)).filter_map(TableFrame::line).collect();
                let mapping = frame.mapping().map(|mapping| builder.mapping(mapping));
                let add = if frame.folded { Builder::folded_location } else { Builder::location };
                let location = add(builder, mapping, frame.address, &lines);
                known.insert(run.clone(), location);
                location
            });
            stack.push(location);
            run.clear();
        }
        let labels = labels.get(set).map(LabelSet::labels).unwrap_or_default();
        builder.sample(&stack, values, &labels);
    }
}
