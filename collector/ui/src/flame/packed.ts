/** The form of a tree that passes from the worker to the page: arrays of numbers move without a copy, names are plain texts. */
import type { Sliced } from "../parts/sliced";
import { type FrameName, NODES_OF_STEP, type Tree } from "./tree";

export interface Packed extends Omit<Tree, "names"> {
  /** Name, file and flags of each distinct frame. */
  name: string[];
  file: Int32Array;
  flags: Uint8Array;
  files: string[];
}

const FLAGS = ["kernel", "inlined", "special"] as const;

export function pack({ names, ...columns }: Tree): Packed {
  const files = new Map<string, number>();
  const file = new Int32Array(names.length);
  const flags = new Uint8Array(names.length);
  for (const [at, frame] of names.entries()) {
    let index = files.get(frame.file);
    if (index === undefined) files.set(frame.file, (index = files.size));
    file[at] = index;
    flags[at] = FLAGS.reduce((bits, flag, bit) => bits | (Number(frame[flag]) << bit), 0);
  }
  return { ...columns, name: names.map(({ name }) => name), file, flags, files: [...files.keys()] };
}

/** Returns the memory that moves to the page. */
export const buffersOf = (packed: Packed): ArrayBuffer[] =>
  Object.values(packed).flatMap((column) => (ArrayBuffer.isView(column) ? [column.buffer as ArrayBuffer] : []));

export function* unpack({ name, file, flags, files, ...columns }: Packed): Sliced<Tree> {
  const names: FrameName[] = [];
  for (let at = 0; at < name.length; at += 1) {
    if (at % NODES_OF_STEP === 0) yield;
    const has = (bit: number) => ((flags[at] as number) >> bit) % 2 === 1;
    names.push({ name: name[at] as string, file: files[file[at] as number] as string, kernel: has(0), inlined: has(1), special: has(2) });
  }
  return { ...columns, names };
}
