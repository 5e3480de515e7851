/**
 * Label selectors of the collector: `{service_name="checkout",pod=~"checkout-.*"}`.
 * The page parses them only to change single matchers. The collector decides whether a selector is valid.
 */
export interface Matcher {
  name: string;
  op: "=" | "!=" | "=~" | "!~";
  value: string;
}

const NAME = /[a-zA-Z_][a-zA-Z0-9_]*/y;
const OPERATOR = /=~|!~|!=|=/y;
const SPACE = /\s*/y;
/** The quoted forms of the collector. A backslash escapes in the first two; backticks hold their text as it is. */
const VALUES = [/"((?:[^"\\]|\\.)*)"/sy, /'((?:[^'\\]|\\.)*)'/sy, /`([^`]*)`/y];
const ESCAPES: Record<string, string> = { n: "\n", t: "\t", "\\": "\\", '"': '"', "'": "'" };

/** Reads a text from left to right. */
class Reader {
  private at = 0;
  constructor(private readonly text: string) {}

  /** Returns the first group of the pattern, or its whole match, and skips both it and white space around it. */
  take(pattern: RegExp): string | undefined {
    SPACE.lastIndex = this.at;
    pattern.lastIndex = this.at + (SPACE.exec(this.text)?.[0].length ?? 0);
    const found = pattern.exec(this.text);
    if (!found) return undefined;
    this.at = pattern.lastIndex;
    return found[1] ?? found[0];
  }

  /** Returns a quoted value without its escapes, or `undefined` if the collector would refuse it. */
  value(): string | undefined {
    for (const pattern of VALUES) {
      const text = this.take(pattern);
      if (text === undefined) continue;
      if (pattern === VALUES[2]) return text;
      let known = true;
      const value = text.replace(/\\(.)/gs, (_, escaped: string) => {
        known &&= escaped in ESCAPES;
        return ESCAPES[escaped] ?? "";
      });
      return known ? value : undefined;
    }
    return undefined;
  }
}

/** Returns the matchers, or `undefined` if the text is not a selector (yet). */
export function parse(text: string): Matcher[] | undefined {
  if (text.trim() === "") return [];
  const reader = new Reader(text);
  if (reader.take(/\{/y) === undefined) return undefined;
  const matchers: Matcher[] = [];
  while (reader.take(/\}/y) === undefined) {
    if (matchers.length > 0 && reader.take(/,/y) === undefined) return undefined;
    // A comma may follow the last condition.
    if (matchers.length > 0 && reader.take(/\}/y) !== undefined) break;
    const [name, op, value] = [reader.take(NAME), reader.take(OPERATOR), reader.value()];
    if (name === undefined || op === undefined || value === undefined) return undefined;
    matchers.push({ name, op: op as Matcher["op"], value });
  }
  return reader.take(/$/y) === undefined ? undefined : matchers;
}

const quote = (value: string) => `"${value.replace(/["\\]/g, "\\$&").replace(/\n/g, "\\n").replace(/\t/g, "\\t")}"`;

export function format(matchers: Matcher[]): string {
  if (matchers.length === 0) return "";
  return `{${matchers.map(({ name, op, value }) => name + op + quote(value)).join(",")}}`;
}

/** Replaces all matchers on `matcher.name` by this one. */
export function replace(matchers: Matcher[], matcher: Matcher): Matcher[] {
  const at = matchers.findIndex(({ name }) => name === matcher.name);
  const others = matchers.filter(({ name }) => name !== matcher.name);
  others.splice(at < 0 ? others.length : Math.min(at, others.length), 0, matcher);
  return others;
}

/** Returns the value that the selector requires for `name`, or an empty text. */
export function pinned(matchers: Matcher[] | undefined, name: string): string {
  const found = matchers?.filter((matcher) => matcher.name === name) ?? [];
  return found.length === 1 && found[0]?.op === "=" ? found[0].value : "";
}
