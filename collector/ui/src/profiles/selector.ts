/**
 * Label selectors of the collector: `{service_name="checkout",pod=~"checkout-.*"}`.
 * The page parses them only to change single matchers. The collector decides whether a selector is valid.
 */
export interface Matcher {
  name: string;
  op: "=" | "!=" | "=~" | "!~";
  value: string;
}

const MATCHER = /^\s*([a-zA-Z_][a-zA-Z0-9_]*)\s*(=~|!~|!=|=)\s*"((?:[^"\\]|\\.)*)"\s*(,|$)/;

/** Returns the matchers, or `undefined` if the text is not a selector (yet). */
export function parse(text: string): Matcher[] | undefined {
  let rest = text.trim();
  if (rest === "") return [];
  if (!rest.startsWith("{") || !rest.endsWith("}")) return undefined;
  rest = rest.slice(1, -1).trim();
  const matchers: Matcher[] = [];
  while (rest !== "") {
    const found = MATCHER.exec(rest);
    if (!found) return undefined;
    const [all, name = "", op = "=", value = ""] = found;
    matchers.push({
      name,
      op: op as Matcher["op"],
      value: value.replace(/\\(.)/g, (_, escaped: string) => (escaped === "n" ? "\n" : escaped)),
    });
    rest = rest.slice(all.length).trim();
  }
  return matchers;
}

const quote = (value: string) => `"${value.replace(/["\\]/g, "\\$&").replace(/\n/g, "\\n")}"`;

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
