import { useEffect, useId, useState } from "preact/hooks";

interface ComboboxProps {
  label: string;
  value: string;
  placeholder?: string;
  load: (signal: AbortSignal) => Promise<string[]>;
  onChoose: (value: string) => void;
  /** Name of a first option that chooses no value. */
  none?: string;
}

interface Option {
  value: string;
  name: string;
}

const MAX_OPTIONS = 200;

/** Loads the options while the list is open. */
function useOptions(open: boolean, load: ComboboxProps["load"]): { options: string[] | undefined; failed: string } {
  const [options, setOptions] = useState<string[]>();
  const [failed, setFailed] = useState("");
  useEffect(() => {
    if (!open) return;
    const abort = new AbortController();
    setOptions(undefined);
    setFailed("");
    load(abort.signal).then(setOptions, (error: Error) => abort.signal.aborted || setFailed(error.message));
    return () => abort.abort();
  }, [open]);
  return { options, failed };
}

/** State of the list: the typed text, the shown options, the active one, and the keys that change them. */
function useCombobox({ load, none, onChoose, value }: ComboboxProps) {
  const id = useId();
  const [open, setOpen] = useState(false);
  const [text, setText] = useState<string>();
  const [active, setActive] = useState(-1);
  const { options, failed } = useOptions(open, load);
  const wanted = (text ?? "").toLowerCase();
  const shown: Option[] = [
    ...(none !== undefined && wanted === "" ? [{ value: "", name: none }] : []),
    ...(options ?? []).filter((option) => option.toLowerCase().includes(wanted)).slice(0, MAX_OPTIONS).map((name) => ({ value: name, name })),
  ];
  const choose = (chosen: string) => {
    setOpen(false);
    setText(undefined);
    setActive(-1);
    onChoose(chosen);
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
  const onInput = (typed: string) => {
    setText(typed);
    setOpen(true);
    setActive(-1);
  };
  const onBlur = () => {
    setOpen(false);
    if (text !== undefined && text.trim() !== value) choose(text.trim());
    setText(undefined);
  };
  return { id, open, setOpen, text, active, options, failed, shown, choose, onKeyDown, onInput, onBlur };
}

/** A text field with suggestions (the combobox pattern). The reader may also type a value that is not among them. */
export function Combobox(props: ComboboxProps) {
  const { id, open, setOpen, text, active, options, failed, shown, choose, onKeyDown, onInput, onBlur } = useCombobox(props);
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
        onInput={(event) => onInput(event.currentTarget.value)}
        onKeyDown={onKeyDown}
        onBlur={onBlur}
      />
      <ul class="options" id={`${id}-list`} role="listbox" aria-label={props.label} hidden={!open}>
        {failed !== "" && <li class="bad" role="presentation">{failed}</li>}
        {options === undefined && failed === "" && <li class="dim" role="presentation">Loading…</li>}
        {options !== undefined && shown.length === 0 && <li class="dim" role="presentation">No match</li>}
        {shown.map((option, at) => (
          <li
            key={option.value}
            id={`${id}-${at}`}
            role="option"
            aria-selected={option.value === props.value}
            class={at === active ? "active" : ""}
            // Runs before the field loses the focus, which closes the list.
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
