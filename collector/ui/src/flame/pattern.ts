/** Patterns that a reader types: searches and filters. */

/** Longest pattern, in characters. */
const MAX_PATTERN = 1000;

const PLAIN = "To find a text as it is, write a backslash before each of . * + ? ( ) [ ] { } | ^ $ \\";

/** Cures of mistakes, by the words that browsers use for them. */
const CURES: [RegExp, string][] = [
  [/unterminated group|missing \)|unterminated parenthetical/i, String.raw`Close the group with ), or write \( for the character itself`],
  [/unmatched '?\)|unmatched parenthes/i, String.raw`Open the group with (, or write \) for the character itself`],
  [/character class|missing \]|unterminated class/i, String.raw`Close the [ with ], or write \[ for the character itself`],
  [/nothing to repeat/i, String.raw`Write something before * + ? or {, or put a backslash before it for the character itself`],
  [/end of pattern|trailing backslash/i, "Write \\\\ for a backslash"],
  [/out of order/i, "Write the smaller number or character first"],
];

export interface Pattern {
  test: (name: string) => boolean;
  /** The mistake and its cure. A wrong pattern matches nothing. */
  error?: string;
}

/** Compiles a regular expression, without regard to case. */
export function compile(text: string): Pattern {
  const none = () => false;
  if (text.length > MAX_PATTERN) return { test: none, error: `The pattern has ${text.length} characters, more than ${MAX_PATTERN}. Shorten it.` };
  try {
    const compiled = new RegExp(text, "i");
    return { test: (name) => compiled.test(name) };
  } catch (error) {
    // `Invalid regular expression: /(/i: Unterminated group`: only the last part is news.
    const reason = (error instanceof Error ? error.message : String(error)).replace(/^Invalid regular expression: (?:\/.*\/[a-z]*: )?/s, "");
    const cure = CURES.find(([words]) => words.test(reason))?.[1] ?? PLAIN;
    return { test: none, error: `Not a regular expression: ${reason.charAt(0).toLowerCase()}${reason.slice(1)}. ${cure}.` };
  }
}

/** Parses a search: part of a name, `"a whole name"`, or `/a pattern/`. */
export function matcher(text: string): Pattern {
  const pattern = /^\/(.*?)\/?$/s.exec(text);
  if (pattern && text.length > 1) return compile(pattern[1] ?? "");
  const exact = /^"(.*)"$/s.exec(text);
  if (exact) return { test: (name) => name === exact[1] };
  const part = text.toLowerCase();
  return { test: (name) => name.toLowerCase().includes(part) };
}
