/** The kinds and groups of frames: language, library, package. */
import type { Colour } from "../state";
import type { FrameName } from "./tree";

/** The languages of mappings that stand for an interpreter. */
const LANGUAGES = new Map([
  ["[cpython]", "python"],
  ["[dotnet]", ".net"],
  ["[jvm]", "java"],
  ["[php]", "php"],
  ["[ruby]", "ruby"],
  ["[v8]", "javascript"],
]);

/** Returns the language of the functions in a mapping that stands for an interpreter; undefined for a file. */
const languageOf = (file: string) => LANGUAGES.get(file);

/** Returns the origin of a function: its crate, package or namespace if the name has one, else its binary. */
export function packageOf(name: string, file: string): string {
  // `handle (app.py:12)`: the source file.
  if (languageOf(file)) return /\(([^()]*):\d+\)$/.exec(name)?.[1] ?? file;
  const bare = name.replace(/^<+(?:&|mut |dyn |\*const |\*mut )*/, "");
  const scoped = /^([A-Za-z_~][\w.$-]*?)(?:\[[0-9a-f]+\])?(?:<[^:]*>)?::/.exec(bare);
  if (scoped?.[1]) return scoped[1];
  const dotted = /^((?:[\w.~-]+\/)+[\w~-]+|[a-z][\w]*)\.[(*\w]/.exec(name);
  // `memcpy.part.0` has the suffix of a compiler, not a package.
  if (dotted?.[1] && !/\.(?:part|constprop|isra|cold|llvm|lto_priv)\b/.test(name)) return dotted[1];
  return file || "[unknown]";
}

/** Returns what runs a function: the kernel, the processor itself, or an interpreter. Frames that are not functions have no kind. */
export const kindOf = (frame: FrameName): string | undefined =>
  frame.special ? undefined : frame.kernel ? "kernel" : (languageOf(frame.file) ?? "native");

export function groupOf(frame: FrameName, colour: Colour): string {
  if (frame.special) return "not a function";
  const language = languageOf(frame.file);
  if (language && colour !== "package") return language;
  if (colour === "kind") return frame.kernel ? "kernel" : frame.inlined ? "native, inlined" : "native";
  if (frame.kernel) return "kernel";
  return colour === "binary" ? frame.file || "[unknown]" : packageOf(frame.name, frame.file);
}
