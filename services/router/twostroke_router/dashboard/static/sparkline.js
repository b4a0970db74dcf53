/** A small line of the last samples, with the highest written beside it by whoever shows it. */

import { svg } from "./dom.js";
import { SAMPLES } from "./roster.js";

const WIDTH = 120;
const HEIGHT = 28;

/** A sparkline; `draw(samples)` shows them, the newest at the right edge. */
export class Sparkline {
  constructor() {
    this._area = svg("path", { class: "area" });
    this._line = svg("path", { class: "line" });
    const view = {
      class: "spark",
      viewBox: `0 0 ${WIDTH} ${HEIGHT}`,
      preserveAspectRatio: "none",
      "aria-hidden": "true",
    };
    this.element = svg("svg", view, this._area, this._line);
  }

  draw(samples) {
    const highest = Math.max(1, ...samples);
    const step = WIDTH / (SAMPLES - 1);
    const first = SAMPLES - samples.length;
    const points = samples.map((value, index) => {
      const y = HEIGHT - 2 - (value / highest) * (HEIGHT - 4);
      return `${((first + index) * step).toFixed(1)} ${y.toFixed(1)}`;
    });
    this._line.setAttribute("d", points.length ? `M${points.join("L")}` : "");
    const start = (first * step).toFixed(1);
    this._area.setAttribute("d", points.length ? `M${start} ${HEIGHT}L${points.join("L")}L${WIDTH} ${HEIGHT}Z` : "");
  }
}
