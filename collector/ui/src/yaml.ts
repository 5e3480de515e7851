/** Formats values as YAML in the style of the documentation: block form, with short lists and maps in one line. */

const PLAIN = /^[A-Za-z_/.][A-Za-z0-9_/.@-]*$/;
const WORDS = new Set(["true", "false", "null", "yes", "no", "on", "off", "y", "n"]);

function scalar(value: unknown): string {
  if (typeof value !== "string") return JSON.stringify(value);
  return (PLAIN.test(value) && !WORDS.has(value.toLowerCase())) || /^\d+(ms|s|m|h|d)$/.test(value) ? value : JSON.stringify(value);
}

const isNest = (value: unknown): value is object => typeof value === "object" && value !== null;

function flow(value: unknown): string {
  if (Array.isArray(value)) return `[${value.map(flow).join(", ")}]`;
  if (isNest(value)) return `{${Object.entries(value).map(([key, inner]) => `${key}: ${flow(inner)}`).join(", ")}}`;
  return scalar(value);
}

export function toYaml(value: unknown, indent = ""): string {
  if (!isNest(value)) return `${indent}${scalar(value)}\n`;
  const line = flow(value);
  if (Array.isArray(value)) {
    if (value.length === 0 || value.every((entry) => !isNest(entry))) return `${indent}${line}\n`;
    return value.map((entry) => `${indent}- ${toYaml(entry, `${indent}  `).trimStart()}`).join("");
  }
  return Object.entries(value)
    .map(([key, inner]) => {
      const short = flow(inner);
      const inline = !isNest(inner) || Object.keys(inner).length === 0 || (Array.isArray(inner) && inner.every((entry) => !isNest(entry)));
      return inline || (short.length < 56 && indent !== "" ) ? `${indent}${key}: ${short}\n` : `${indent}${key}:\n${toYaml(inner, `${indent}  `)}`;
    })
    .join("");
}
