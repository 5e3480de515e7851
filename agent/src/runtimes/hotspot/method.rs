//! Names and lines of Java methods.

use super::{
    super::{
        CodeFunction, FunctionText, Memory, WhyNot,
        memory::{half, word},
        printable,
    },
    layout::{Layout, MethodLayout},
    numbers::Numbers,
};

/// Bytes of a name.
const MAX_TEXT: usize = 512;
/// Lines of a method.
const MAX_LINES: usize = 8192;
const MAX_LINE_BYTES: u64 = 64 << 10;

/// Reads a 16-bit word.
fn short(bytes: &[u8], offset: u64) -> u16 {
    let rest = usize::try_from(offset).ok().and_then(|offset| bytes.get(offset..));
    rest.and_then(|rest| rest.first_chunk()).map_or(0, |two| u16::from_ne_bytes(*two))
}

/// Reads a method by its address.
pub(super) fn read(layout: &Layout, method: u64, memory: &dyn Memory) -> Result<CodeFunction, WhyNot> {
    let of = &layout.method;
    if method == 0 || !method.is_multiple_of(8) {
        return Err(WhyNot::Implausible("no method"));
    }
    let constant = word(&memory.bytes(method, of.bytes as usize)?, of.constant as usize);
    let head = memory.bytes(constant, of.constant_bytes as usize)?;
    let pool = word(&head, of.pool as usize);
    let code_size = u64::from(short(&head, of.code_size));
    let begin = constant.wrapping_add(of.constant_bytes);
    let bytes = u64::from(half(&head, of.words as usize)) * 8;
    if bytes < of.constant_bytes + code_size {
        return Err(WhyNot::Implausible("a method larger than itself"));
    }
    let pool_head = memory.bytes(pool, of.pool_bytes as usize)?;
    let holder = word(&pool_head, of.holder as usize);
    let class = symbol(of, memory.u64(holder.wrapping_add(of.class_name))?, memory)?;
    let name = symbol(of, entry(of, pool, short(&head, of.name), memory)?, memory)?;
    let source = if of.source_in_pool {
        short(&pool_head, of.source)
    } else {
        u16::from_ne_bytes(memory.array(holder.wrapping_add(of.source))?)
    };
    let file = match source {
        0 => String::new(),
        index => symbol(of, entry(of, pool, index, memory)?, memory)?,
    };
    let has_lines = half(&head, of.flags as usize) & of.has_lines != 0;
    let lines = if has_lines {
        let at = begin.wrapping_add(code_size);
        let length = (bytes - of.constant_bytes - code_size).min(MAX_LINE_BYTES);
        line_table(&memory.bytes(at, length as usize)?, layout.without_zero)
    } else {
        Vec::new()
    };
    let first_line = lines.iter().map(|(_, line)| *line).min().unwrap_or(0);
    let text = FunctionText {
        name: format!("{}.{name}", class_name(&class)),
        file,
        first_line: first_line.into(),
        lines: encoded(&lines),
    };
    Ok(CodeFunction { text, instructions: begin..begin.wrapping_add(code_size) })
}

/// Returns an entry of a constant pool.
fn entry(of: &MethodLayout, pool: u64, index: u16, memory: &dyn Memory) -> Result<u64, WhyNot> {
    // The lowest bit is a mark.
    memory.u64(pool.wrapping_add(of.pool_bytes).wrapping_add(8 * u64::from(index))).map(|entry| entry & !1)
}

fn symbol(of: &MethodLayout, at: u64, memory: &dyn Memory) -> Result<String, WhyNot> {
    if at == 0 {
        return Err(WhyNot::Implausible("no name"));
    }
    let length = u16::from_ne_bytes(memory.array(at.wrapping_add(of.symbol_length))?);
    let bytes = memory.bytes(at.wrapping_add(of.symbol_body), usize::from(length).min(MAX_TEXT))?;
    if bytes.is_empty() {
        return Err(WhyNot::Implausible("an empty name"));
    }
    Ok(printable(&String::from_utf8_lossy(&bytes)))
}

/// Returns the name of a class as programs print it. The address in the name of a hidden class differs in each process, so it
/// is left out.
fn class_name(internal: &str) -> String {
    let dotted = internal.replace('/', ".");
    let is_address =
        |rest: &str| rest.strip_prefix("0x").is_some_and(|hex| hex.bytes().all(|b| b.is_ascii_hexdigit()));
    for separator in ['+', '.'] {
        if let Some((class, rest)) = dotted.rsplit_once(separator)
            && is_address(rest)
        {
            return class.to_owned();
        }
    }
    dotted
}

/// Decodes the table of lines: position and line each.
fn line_table(bytes: &[u8], without_zero: bool) -> Vec<(u16, u16)> {
    let mut numbers = Numbers::new(bytes, without_zero);
    let (mut position, mut line) = (0_i32, 0_i32);
    let mut lines = Vec::new();
    while lines.len() < MAX_LINES {
        let (step, lines_on) = match numbers.byte() {
            None | Some(0) => break,
            Some(0xff) => match (numbers.signed(), numbers.signed()) {
                (Some(step), Some(lines_on)) => (step, lines_on),
                _ => break,
            },
            Some(byte) => (i32::from(byte >> 3), i32::from(byte & 7)),
        };
        (position, line) = (position.wrapping_add(step), line.wrapping_add(lines_on));
        let (Ok(at), Ok(number)) = (u16::try_from(position), u16::try_from(line)) else { break };
        lines.push((at, number));
    }
    lines
}

/// Returns the table in the form of [`line_at`], from that of the virtual machine.
pub(super) fn line_bytes(bytes: &[u8], without_zero: bool) -> Vec<u8> {
    encoded(&line_table(bytes, without_zero))
}

fn encoded(lines: &[(u16, u16)]) -> Vec<u8> {
    lines.iter().flat_map(|(at, line)| [at.to_le_bytes(), line.to_le_bytes()]).flatten().collect()
}

/// Returns the line of a position: that of the last entry at or before it.
pub(super) fn line_at(table: &[u8], position: u32) -> u32 {
    let entries = table.as_chunks::<4>().0.iter().map(|[a, b, c, d]| {
        (u32::from(u16::from_le_bytes([*a, *b])), u32::from(u16::from_le_bytes([*c, *d])))
    });
    entries.filter(|(at, _)| *at <= position).max_by_key(|(at, _)| *at).map_or(0, |(_, line)| line)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_classes_are_those_that_programs_print() {
        for (internal, printed) in [
            ("com/acme/Cart", "com.acme.Cart"),
            ("Spin$$Lambda$14+0x0000000800c03000", "Spin$$Lambda$14"),
            ("Spin$$Lambda/0x0000000800c03000", "Spin$$Lambda"),
            ("a/b+0xyz", "a.b+0xyz"),
        ] {
            assert_eq!(class_name(internal), printed);
        }
    }

    #[test]
    fn lines_are_those_of_the_last_entry_before() {
        // Steps of one byte: 1 and 2 lines on, 5 and 2 back by the long form, whose numbers have their sign in the lowest bit.
        let table = [1 << 3 | 2, 0xff, 10, 3, 0, 0x09];
        let lines = line_table(&table, false);
        assert_eq!(lines, [(1, 2), (6, 0)]);
        let bytes: Vec<u8> = [(0_u16, 10_u16), (5, 12), (300, 4)]
            .iter()
            .flat_map(|(at, line)| [at.to_le_bytes(), line.to_le_bytes()])
            .flatten()
            .collect();
        let found = [0, 4, 5, 299, 300, 70_000].map(|position| line_at(&bytes, position));
        assert_eq!(found, [10, 10, 12, 12, 4, 4]);
    }
}
