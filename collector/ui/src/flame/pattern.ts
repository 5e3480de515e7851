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

/** Compiles a regular expression, without regard to case. Throws the browser's `SyntaxError`. */
export const compile = (pattern: string): RegExp => new RegExp(pattern, "i");

/** Returns the mistake in a regular expression and its cure. */
export function mistakeIn(pattern: string): string | undefined {
  if (pattern.length > MAX_PATTERN) return `The pattern has ${pattern.length} characters, more than ${MAX_PATTERN}. Shorten it.`;
  try {
    compile(pattern);
    return undefined;
  } catch (error) {
    // `Invalid regular expression: /(/i: Unterminated group`: only the last part is news.
    const reason = (error instanceof Error ? error.message : String(error)).replace(/^Invalid regular expression: (?:\/.*\/[a-z]*: )?/s, "");
    const cure = CURES.find(([words]) => words.test(reason))?.[1] ?? PLAIN;
    return `Not a regular expression: ${reason.charAt(0).toLowerCase()}${reason.slice(1)}. ${cure}.`;
  }
}

/** The names to find: by a regular expression, or by a test that is quick on every name. */
export type Wanted = { pattern: string } | { test: (name: string) => boolean };

/** Parses a search: part of a name, `"a whole name"`, or `/a pattern/`. */
export function wanted(search: string): Wanted {
  const pattern = /^\/(.*?)\/?$/s.exec(search);
  if (pattern && search.length > 1) return { pattern: pattern[1] ?? "" };
  const exact = /^"(.*)"$/s.exec(search);
  if (exact) return { test: (name) => name === exact[1] };
  const part = search.toLowerCase();
  return { test: (name) => name.toLowerCase().includes(part) };
}
