/** Small pieces that several views use. */
import type { ComponentChildren, RefObject } from "preact";
import { useEffect, useId, useLayoutEffect, useRef, useState } from "preact/hooks";
import { ApiError } from "./api";

/** The inner width of an element, as it changes. */
export function useWidth(element: RefObject<HTMLElement | null>): number {
  const [width, set] = useState(0);
  useLayoutEffect(() => {
    if (!element.current) return;
    const observer = new ResizeObserver(([entry]) => set(Math.floor(entry?.contentRect.width ?? 0)));
    observer.observe(element.current);
    return () => observer.disconnect();
  }, []);
  return width;
}

export interface Load<T> {
  data?: T;
  error?: ApiError;
  loading: boolean;
}

/** Runs `load` at each change of `key`; keeps what was there until the new answer has come. No key: nothing to load. */
export function useLoad<T>(key: string | undefined, load: (signal: AbortSignal) => Promise<T>): Load<T> {
  const [state, set] = useState<Load<T>>({ loading: key !== undefined });
  useEffect(() => {
    if (key === undefined) {
      set({ loading: false });
      return;
    }
    const abort = new AbortController();
    set((before) => ({ ...before, loading: true }));
    load(abort.signal).then(
      (data) => abort.signal.aborted || set({ data, loading: false }),
      (error: unknown) => {
        if (abort.signal.aborted) return;
        set({ error: error instanceof ApiError ? error : new ApiError(String(error), 0), loading: false });
      },
    );
    return () => abort.abort();
  }, [key]);
  return state;
}

/** Counts up every `seconds` while `on` and while somebody looks; the returned function counts up at once. */
export function useTick(on: boolean, seconds: number): [number, () => void] {
  const [tick, set] = useState(0);
  useEffect(() => {
    if (!on) return;
    const timer = setInterval(() => document.hidden || set((before) => before + 1), seconds * 1000);
    return () => clearInterval(timer);
  }, [on, seconds]);
  return [tick, () => set((before) => before + 1)];
}

export function Problem({ error }: { error: ApiError }) {
  return (
    <div class="problem" role="alert">
      <strong>{error.status === 0 ? "No connection" : "That did not work"}</strong>
      <span>{error.message}</span>
    </div>
  );
}

export function Command({ text }: { text: string }) {
  const [done, set] = useState(false);
  return (
    <div class="command">
      <pre tabIndex={0}><code>{text}</code></pre>
      <button
        type="button"
        class="quiet"
        aria-label="Copy the command"
        onClick={() => void navigator.clipboard?.writeText(text).then(() => {
          set(true);
          setTimeout(() => set(false), 1500);
        })}
      >
        {done ? "Copied" : "Copy"}
      </button>
    </div>
  );
}

/** A button that opens a box below it; closes by Escape, by a click elsewhere, and when the focus leaves. */
export function Popover(props: {
  label: ComponentChildren;
  name: string;
  class?: string;
  children: (close: () => void) => ComponentChildren;
}) {
  const [open, set] = useState(false);
  const box = useRef<HTMLDivElement>(null);
  const button = useRef<HTMLButtonElement>(null);
  const id = useId();
  const close = () => {
    set(false);
    button.current?.focus();
  };
  // Before the next key arrives: somebody who types ahead means the box.
  useLayoutEffect(() => {
    if (!open) return;
    box.current?.querySelector<HTMLElement>(".popover input, .popover button, .popover select")?.focus();
    const outside = (event: Event) => {
      if (event.target instanceof Node && !box.current?.contains(event.target)) set(false);
    };
    document.addEventListener("pointerdown", outside);
    document.addEventListener("focusin", outside);
    return () => {
      document.removeEventListener("pointerdown", outside);
      document.removeEventListener("focusin", outside);
    };
  }, [open]);
  return (
    <div
      class={`popover-host ${props.class ?? ""}`}
      ref={box}
      onKeyDown={(event) => {
        if (event.key !== "Escape" || !open || event.defaultPrevented) return;
        event.stopPropagation();
        close();
      }}
    >
      <button type="button" class="field" ref={button} aria-haspopup="dialog" aria-expanded={open} aria-controls={open ? id : undefined} aria-label={props.name} onClick={() => set(!open)}>
        {props.label}
        <span class="caret" aria-hidden="true" />
      </button>
      {open && (
        // Takes the focus of a click beside its controls, which would otherwise count as leaving it.
        <div class="popover" id={id} role="dialog" aria-label={props.name} tabIndex={-1}>
          {props.children(close)}
        </div>
      )}
    </div>
  );
}

/** A text field with suggestions (the combobox pattern); what is typed counts too. */
export function Combobox(props: {
  label: string;
  value: string;
  placeholder?: string;
  load: (signal: AbortSignal) => Promise<string[]>;
  onChoose: (value: string) => void;
  /** A first entry that means none. */
  none?: string;
}) {
  const id = useId();
  const [open, setOpen] = useState(false);
  const [text, setText] = useState<string>();
  const [options, setOptions] = useState<string[]>();
  const [failed, setFailed] = useState("");
  const [active, setActive] = useState(-1);
  useEffect(() => {
    if (!open) return;
    const abort = new AbortController();
    setOptions(undefined);
    setFailed("");
    props.load(abort.signal).then(setOptions, (error: Error) => abort.signal.aborted || setFailed(error.message));
    return () => abort.abort();
  }, [open]);
  const wanted = (text ?? "").toLowerCase();
  const shown: { value: string; name: string }[] = [
    ...(props.none !== undefined && wanted === "" ? [{ value: "", name: props.none }] : []),
    ...(options ?? []).filter((option) => option.toLowerCase().includes(wanted)).slice(0, 200).map((name) => ({ value: name, name })),
  ];
  const choose = (value: string) => {
    setOpen(false);
    setText(undefined);
    setActive(-1);
    props.onChoose(value);
  };
  const onKeyDown = (event: KeyboardEvent) => {
    if (event.key === "ArrowDown" || event.key === "ArrowUp") {
      event.preventDefault();
      if (!open) return setOpen(true);
      const step = event.key === "ArrowDown" ? 1 : -1;
      const next = shown.length === 0 ? -1 : (active + step + shown.length) % shown.length;
      setActive(next);
      document.getElementById(`${id}-${next}`)?.scrollIntoView({ block: "nearest" });
    } else if (event.key === "Enter") {
      event.preventDefault();
      const picked = shown[active];
      if (open && picked) choose(picked.value);
      else if (text !== undefined) choose(text.trim());
    } else if (event.key === "Escape" && open) {
      event.preventDefault();
      event.stopPropagation();
      setOpen(false);
      setText(undefined);
    }
  };
  return (
    <div class="combobox">
      <label class="label" for={id}>{props.label}</label>
      <input
        id={id}
        class="field"
        role="combobox"
        type="text"
        autocomplete="off"
        spellcheck={false}
        aria-autocomplete="list"
        aria-expanded={open}
        aria-controls={`${id}-list`}
        aria-activedescendant={open && active >= 0 ? `${id}-${active}` : undefined}
        placeholder={props.placeholder}
        value={text ?? props.value}
        onFocus={(event) => event.currentTarget.select()}
        onClick={() => setOpen(true)}
        onInput={(event) => {
          setText(event.currentTarget.value);
          setOpen(true);
          setActive(-1);
        }}
        onKeyDown={onKeyDown}
        onBlur={() => {
          setOpen(false);
          if (text !== undefined && text.trim() !== props.value) choose(text.trim());
          setText(undefined);
        }}
      />
      <ul class="options" id={`${id}-list`} role="listbox" aria-label={props.label} hidden={!open}>
        {failed !== "" && <li class="bad" role="presentation">{failed}</li>}
        {options === undefined && failed === "" && <li class="dim" role="presentation">Loading…</li>}
        {options !== undefined && shown.length === 0 && <li class="dim" role="presentation">Nothing fits</li>}
        {shown.map((option, at) => (
          <li
            key={option.value}
            id={`${id}-${at}`}
            role="option"
            aria-selected={option.value === props.value}
            class={at === active ? "active" : ""}
            // Before the field loses the focus and the list closes.
            onPointerDown={(event) => {
              event.preventDefault();
              choose(option.value);
            }}
          >
            {option.name}
          </li>
        ))}
      </ul>
    </div>
  );
}

/** A row of buttons of which one is on. */
export function Choice<T extends string>(props: { name: string; value: T; of: [T, string][]; onChange: (value: T) => void }) {
  return (
    <div class="choice" role="group" aria-label={props.name}>
      {props.of.map(([value, name]) => (
        <button key={value} type="button" aria-pressed={value === props.value} onClick={() => props.onChange(value)}>
          {name}
        </button>
      ))}
    </div>
  );
}

export function Toggle(props: { name: string; on: boolean; onChange: (on: boolean) => void; title?: string }) {
  return (
    <label class="toggle" title={props.title}>
      <input type="checkbox" role="switch" checked={props.on} onChange={(event) => props.onChange(event.currentTarget.checked)} />
      <span class="switch" aria-hidden="true" />
      <span>{props.name}</span>
    </label>
  );
}
