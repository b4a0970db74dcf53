/** The dialog that asks for an API key. The key stays in this tab's session storage. */

import { setText } from "./dom.js";

/** The dialog, and the button that opens it again. */
export class KeyDialog {
  /** `onKey` is called with each key that is given. */
  constructor({ dialog, form, input, problem, cancel, button }, onKey) {
    this._dialog = dialog;
    this._input = input;
    this._problem = problem;
    this._button = button;
    this._isDismissed = false;
    form.addEventListener("submit", () => {
      onKey(input.value.trim());
      input.value = "";
    });
    cancel.addEventListener("click", () => dialog.close());
    dialog.addEventListener("close", () => (this._isDismissed = true));
    button.addEventListener("click", () => this._open(""));
  }

  /** The router refused: asks, unless that was answered with "not now". */
  refused(hadKey) {
    this._button.hidden = false;
    if (!this._dialog.open && (!this._isDismissed || hadKey))
      this._open(hadKey ? "The router does not know that key." : "");
  }

  _open(problem) {
    setText(this._problem, problem);
    this._dialog.showModal();
    this._input.focus();
  }
}
