import type { ComponentChildren } from "preact";
import { useId, useLayoutEffect, useRef, useState } from "preact/hooks";
import { usePageKey } from "./hooks";

/** A button with a box below it. Escape, a click elsewhere, or moving the focus away closes the box. */
export function Popover(props: {
  label: ComponentChildren;
  name: string;
  class?: string;
  /** A key that opens the box from anywhere on the page. */
  hotkey?: string;
  children: (close: () => void) => ComponentChildren;
}) {
  const [open, set] = useState(false);
  const box = useRef<HTMLDivElement>(null);
  const button = useRef<HTMLButtonElement>(null);
  const id = useId();
  usePageKey(props.hotkey, () => set(true));
  const close = () => {
    set(false);
    button.current?.focus();
  };
  // Moves the focus before the next key arrives, because a reader who types ahead means the box.
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
        // The box is focusable, so that a click beside its controls does not move the focus away and close it.
        <div class="popover" id={id} role="dialog" aria-label={props.name} tabIndex={-1}>
          {props.children(close)}
        </div>
      )}
    </div>
  );
}
