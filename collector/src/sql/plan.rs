//! Conditions of a query on columns, by which a scan skips files, row groups and rows.
//!
//! SQLite checks each condition again, so a scan may return rows that do not meet one. It must not skip a row that does.

use std::cmp::Ordering;

use rusqlite::{types::ValueRef, vtab::IndexConstraintOp};

use crate::table::{Bounds, Column, Kind, TableSnapshot};

/// Columns of each virtual table before those of its files.
pub(super) const DATE: usize = 0;
pub(super) const HOUR: usize = 1;
/// Number of these columns.
pub(super) const PARTITION_COLUMNS: usize = 2;

/// A comparison of a column with a constant.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Op {
    Eq,
    Gt,
    Le,
    Lt,
    Ge,
}

impl Op {
    /// Returns the comparison that SQLite names, or `None` for one that skips nothing.
    pub(super) fn of(op: &IndexConstraintOp) -> Option<Self> {
        Some(match op {
            IndexConstraintOp::SQLITE_INDEX_CONSTRAINT_EQ => Self::Eq,
            IndexConstraintOp::SQLITE_INDEX_CONSTRAINT_GT => Self::Gt,
            IndexConstraintOp::SQLITE_INDEX_CONSTRAINT_LE => Self::Le,
            IndexConstraintOp::SQLITE_INDEX_CONSTRAINT_LT => Self::Lt,
            IndexConstraintOp::SQLITE_INDEX_CONSTRAINT_GE => Self::Ge,
            _ => return None,
        })
    }

    fn letter(self) -> char {
        match self {
            Self::Eq => '=',
            Self::Gt => '>',
            Self::Le => 'l',
            Self::Lt => '<',
            Self::Ge => 'g',
        }
    }

    fn of_letter(letter: char) -> Option<Self> {
        [Self::Eq, Self::Gt, Self::Le, Self::Lt, Self::Ge].into_iter().find(|op| op.letter() == letter)
    }

    /// Reports whether a value that compares so with the constant meets the condition.
    pub(super) fn accepts(self, order: Ordering) -> bool {
        match self {
            Self::Eq => order.is_eq(),
            Self::Gt => order.is_gt(),
            Self::Le => order.is_le(),
            Self::Lt => order.is_lt(),
            Self::Ge => order.is_ge(),
        }
    }

    /// Reports whether a value between both bounds can meet the condition.
    fn admits<T: Ord + ?Sized>(self, min: &T, max: &T, constant: &T) -> bool {
        match self {
            Self::Eq => min <= constant && constant <= max,
            Self::Gt | Self::Ge => self.accepts(max.cmp(constant)),
            Self::Lt | Self::Le => self.accepts(min.cmp(constant)),
        }
    }
}

/// Comparisons of columns with values that a scan gets when it starts, as SQLite keeps them between plan and scan.
pub(super) fn encode(tests: impl IntoIterator<Item = (usize, Op)>) -> String {
    tests.into_iter().map(|(column, op)| format!("{column}{}", op.letter())).collect::<Vec<_>>().join(",")
}

/// Reads what [`encode`] wrote.
pub(super) fn decode(text: &str) -> Vec<(usize, Op)> {
    let test = |part: &str| {
        let letter = part.chars().next_back()?;
        Some((part.strip_suffix(letter)?.parse().ok()?, Op::of_letter(letter)?))
    };
    text.split(',').filter_map(test).collect()
}

/// A constant of a condition.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Constant {
    Long(i64),
    Text(Vec<u8>),
}

/// A condition whose constant is known.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Test {
    /// Column of the virtual table.
    pub(super) column: usize,
    pub(super) op: Op,
    pub(super) constant: Constant,
}

/// The form of a condition when a scan starts.
pub(super) enum Bound {
    Test(Test),
    /// No row meets a comparison with NULL.
    Never,
    /// SQLite compares values of different types by its own rules.
    Unknown,
}

/// Returns the kind of a column of the virtual table that has conditions. `None`: it has none.
pub(super) fn comparable(table: &TableSnapshot, column: usize) -> Option<Kind> {
    match column {
        DATE => Some(Kind::Text),
        HOUR => Some(Kind::Long),
        _ => {
            let kind = table.columns().get(column - PARTITION_COLUMNS)?.kind;
            matches!(kind, Kind::Text | Kind::Long | Kind::Time).then_some(kind)
        }
    }
}

/// Reads a constant. Fails with a text for a day or a time in another form, which would never be equal.
pub(super) fn bind(
    table: &TableSnapshot,
    column: usize,
    op: Op,
    value: ValueRef<'_>,
) -> Result<Bound, String> {
    let Some(kind) = comparable(table, column) else { return Ok(Bound::Unknown) };
    if column == DATE || kind == Kind::Time {
        check_time(column == DATE, value)?;
    }
    let constant = match (kind, value) {
        (_, ValueRef::Null) => return Ok(Bound::Never),
        (Kind::Long, ValueRef::Integer(value)) => Constant::Long(value),
        (Kind::Text | Kind::Time, ValueRef::Text(text)) => Constant::Text(text.to_vec()),
        _ => return Ok(Bound::Unknown),
    };
    Ok(Bound::Test(Test { column, op, constant }))
}

fn check_time(is_date: bool, value: ValueRef<'_>) -> Result<(), String> {
    let text = match value {
        ValueRef::Null => return Ok(()),
        ValueRef::Text(text) => String::from_utf8_lossy(text).into_owned(),
        other => format!("{other:?}"),
    };
    // Texts are compared byte by byte, so a day may be the start of a time, and a time may lack its end.
    let pattern: &[u8] = if is_date { b"0000-00-00" } else { b"0000-00-00 00:00:00.000000" };
    let matches =
        |(pattern, byte): (&u8, &u8)| if *pattern == b'0' { byte.is_ascii_digit() } else { pattern == byte };
    let has_form =
        (10..=pattern.len()).contains(&text.len()) && pattern.iter().zip(text.as_bytes()).all(matches);
    let (name, form) = if is_date { ("date", "2026-01-31") } else { ("time", "2026-01-31 12:00:00") };
    if has_form {
        return Ok(());
    }
    Err(format!("{name}: compare it with a text like '{form}' (UTC), not with `{text}`"))
}

/// Formats a time of a table for SQL.
pub(super) fn time_text(micros: i64) -> String {
    let at = jiff::Timestamp::from_microsecond(micros).unwrap_or_default();
    at.strftime("%Y-%m-%d %H:%M:%S.%3f").to_string()
}

impl Test {
    /// Returns the column in the files, or `None` for a column of the partition.
    pub(super) fn file_column(&self) -> Option<usize> {
        self.column.checked_sub(PARTITION_COLUMNS)
    }

    /// Reports whether a file of this day and hour can have rows that meet the condition.
    pub(super) fn admits_partition(&self, date: &str, hour: i64) -> bool {
        match (self.column, &self.constant) {
            (DATE, Constant::Text(text)) => self.op.accepts(date.as_bytes().cmp(text)),
            (HOUR, Constant::Long(number)) => self.op.accepts(hour.cmp(number)),
            _ => true,
        }
    }

    /// Reports whether rows within these bounds can meet the condition.
    pub(super) fn admits(&self, of: &Column, bounds: &Bounds) -> bool {
        match (bounds, &self.constant) {
            (Bounds::Longs(min, max), Constant::Long(number)) => self.op.admits(min, max, number),
            (Bounds::Longs(min, max), Constant::Text(text)) if of.kind == Kind::Time => {
                let (min, max) = (time_text(*min), time_text(*max));
                self.op.admits(min.as_bytes(), max.as_bytes(), text)
            }
            (Bounds::Texts(min, max), Constant::Text(text)) => self.op.admits(min, max, text),
            _ => true,
        }
    }
}

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::*;

    #[test]
    fn comparisons_survive_the_way_through_sqlite() {
        let tests = vec![(0, Op::Ge), (13, Op::Eq), (2, Op::Lt), (2, Op::Le), (5, Op::Gt)];
        assert_eq!(decode(&encode(tests.clone())), tests);
        assert_eq!(decode(""), []);
    }

    #[rstest]
    #[case(Op::Eq, &[5, 6, 7, 8, 9])]
    #[case(Op::Gt, &[3, 4, 5, 6, 7, 8])]
    #[case(Op::Ge, &[3, 4, 5, 6, 7, 8, 9])]
    #[case(Op::Lt, &[6, 7, 8, 9, 10, 11])]
    #[case(Op::Le, &[5, 6, 7, 8, 9, 10, 11])]
    fn bounds_skip_only_what_no_row_meets(#[case] op: Op, #[case] wanted: &[i64]) {
        let admitted: Vec<i64> = (3..12).filter(|constant| op.admits(&5, &9, constant)).collect();
        assert_eq!(admitted, wanted);
    }

    #[rstest]
    #[case(true, "2026-01-31", true)]
    #[case(true, "2026-01-31 12:00:00", false)]
    #[case(true, "31.01.2026", false)]
    #[case(false, "2026-01-31", true)]
    #[case(false, "2026-01-31 12:00:00", true)]
    #[case(false, "2026-01-31 12:00:00.125", true)]
    #[case(false, "2026-01-31T12:00:00Z", false)]
    #[case(false, "now", false)]
    fn a_time_in_another_form_is_refused(#[case] is_date: bool, #[case] text: &str, #[case] is_right: bool) {
        let checked = check_time(is_date, ValueRef::Text(text.as_bytes()));
        assert_eq!(checked.is_ok(), is_right, "{checked:?}");
        assert!(check_time(is_date, ValueRef::Integer(1_700_000_000)).is_err());
    }
}
