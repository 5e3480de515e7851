/** The search for functions. The key `/` focuses it from anywhere on the page. */
import type { RefObject } from "preact";
import { useEffect, useRef, useState } from "preact/hooks";
import { type State, go } from "../state";

/** Returns the typed text, which reaches the address 150 ms after the last key. */
function useTyped(state: State): [string, (text: string) => void] {
  const [typed, setTyped] = useState(state.search);
  useEffect(() => setTyped(state.search), [state.search]);
  useEffect(() => {
    if (typed === state.search) return;
    const timer = setTimeout(() => go({ search: typed }, true), 150);
    return () => clearTimeout(timer);
  }, [typed]);
  return [typed, setTyped];
}

/** Focuses the field on the key `/`, unless the reader types somewhere. */
function useSlashKey(field: RefObject<HTMLInputElement | null>) {
  useEffect(() => {
    const onKey = (event: KeyboardEvent) => {
      const target = event.target instanceof HTMLElement ? event.target : undefined;
      if (event.key !== "/" || event.ctrlKey || event.metaKey || target?.closest("input, select, textarea")) return;
      event.preventDefault();
      field.current?.focus();
      field.current?.select();
    };
    addEventListener("keydown", onKey);
    return () => removeEventListener("keydown", onKey);
  }, []);
}

export function SearchField({ state }: { state: State }) {
  const field = useRef<HTMLInputElement>(null);
  const [typed, setTyped] = useTyped(state);
  useSlashKey(field);
  return (
    <div class="search">
      <input
        ref={field}
        class="field"
        type="search"
        aria-label="Search functions: part of a name, a whole name in quotes, or a /pattern/"
        placeholder="Search functions"
        title={'Part of a name, "a whole name", or /a pattern/'}
        spellcheck={false}
        value={typed}
        onInput={(event) => setTyped(event.currentTarget.value)}
        onKeyDown={(event) => {
          if (event.key === "Escape") {
            event.preventDefault();
            setTyped("");
          } else if (event.key === "Enter") {
            go({ search: typed }, true);
            document.querySelector<HTMLElement>(".flame-graph")?.focus();
          }
        }}
      />
      <kbd aria-hidden="true">/</kbd>
    </div>
  );
}
