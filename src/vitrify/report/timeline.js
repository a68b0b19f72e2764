// Draws engines x time on canvases. Jobs narrower than a pixel are drawn as the share of it that they fill, by colour.
(() => {
  "use strict";
  const data = JSON.parse(document.getElementById("timeline-data").textContent);
  const LANE = 26, GAP = 6, AXIS = 22, LEFT = 110, STRIP = 3;
  const groups = data.groups.length;
  const lanes = data.queues.map((queue) => {
    const count = queue.gap.length;
    const lane = { ...queue, start: new Float64Array(count), end: new Float64Array(count), op: new Int32Array(count) };
    let until = 0, op = 0;
    for (let i = 0; i < count; i++) {
      lane.start[i] = until + queue.gap[i];
      until = lane.end[i] = lane.start[i] + queue.length[i];
      op = lane.op[i] = op + queue.step[i];
    }
    return lane;
  });
  const tip = document.getElementById("timeline-tip");
  const number = (value) => Math.round(value).toLocaleString("en");
  const time = (cycles) => {
    const us = cycles / data.mhz;
    return us >= 1000 ? `${(us / 1000).toPrecision(4)} ms` : `${us.toPrecision(3)} µs`;
  };

  // The first job of a lane that ends after `at`.
  const first = (lane, at) => {
    let low = 0, high = lane.end.length;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (lane.end[middle] > at) high = middle; else low = middle + 1;
    }
    return low;
  };

  class Timeline {
    constructor(figure) {
      this.figure = figure;
      this.canvas = figure.querySelector("canvas");
      this.context = this.canvas.getContext("2d");
      this.home = [Number(figure.dataset.from), Number(figure.dataset.to)];
      [this.from, this.to] = this.home;
      this.canvas.style.height = `${lanes.length * (LANE + GAP) + AXIS}px`;
      for (const button of figure.querySelectorAll("button")) {
        button.addEventListener("click", () => this.act(button.dataset.act));
      }
      figure.querySelector("select")?.addEventListener("change", (event) => {
        this.home = event.target.value.split(" ").map(Number);
        this.show(...this.home);
      });
      this.canvas.addEventListener("keydown", (event) => {
        const act = { ArrowLeft: "left", ArrowRight: "right", "+": "in", "=": "in", "-": "out", 0: "home" }[event.key];
        if (act) { this.act(act); event.preventDefault(); }
      });
      this.canvas.addEventListener("wheel", (event) => this.wheel(event), { passive: false });
      this.canvas.addEventListener("dblclick", (event) => this.zoom(0.25, this.at(event)));
      this.canvas.addEventListener("pointerdown", (event) => {
        this.drag = { x: event.clientX, from: this.from, to: this.to };
        this.canvas.setPointerCapture(event.pointerId);
      });
      this.canvas.addEventListener("pointerup", () => { this.drag = null; });
      this.canvas.addEventListener("pointercancel", () => { this.drag = null; });
      this.canvas.addEventListener("pointermove", (event) => this.move(event));
      this.canvas.addEventListener("pointerleave", () => { tip.hidden = true; });
      new ResizeObserver(() => this.redraw()).observe(this.canvas);
      matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.redraw());
    }

    get width() { return Math.max(1, this.canvas.clientWidth - LEFT); }
    at(event) { return this.from + (event.offsetX - LEFT) / this.width * (this.to - this.from); }

    act(what) {
      const middle = (this.from + this.to) / 2, by = (this.to - this.from) / 4;
      if (what === "in") this.zoom(0.5, middle);
      if (what === "out") this.zoom(2, middle);
      if (what === "left") this.show(this.from - by, this.to - by);
      if (what === "right") this.show(this.from + by, this.to + by);
      if (what === "home") this.show(...this.home);
    }

    zoom(factor, at) { this.show(at - (at - this.from) * factor, at + (this.to - at) * factor); }

    show(from, to) {
      const span = Math.min(Math.max(to - from, 20), data.cycles);
      this.from = Math.min(Math.max(from, 0), data.cycles - span);
      this.to = this.from + span;
      this.redraw();
    }

    // A plain wheel scrolls the page, as everywhere else.
    wheel(event) {
      if (event.ctrlKey || event.metaKey) {
        this.zoom(Math.exp(event.deltaY * 0.005), this.at(event));
      } else if (Math.abs(event.deltaX) > Math.abs(event.deltaY) || event.shiftKey) {
        const by = (event.deltaX || event.deltaY) / this.width * (this.to - this.from);
        this.show(this.from + by, this.to + by);
      } else return;
      event.preventDefault();
    }

    move(event) {
      if (this.drag) {
        const by = (this.drag.x - event.clientX) / this.width * (this.drag.to - this.drag.from);
        this.show(this.drag.from + by, this.drag.to + by);
        tip.hidden = true;
        return;
      }
      const lane = lanes[Math.floor(event.offsetY / (LANE + GAP))];
      const text = lane && event.offsetX >= LEFT ? this.describe(lane, this.at(event)) : "";
      tip.hidden = !text;
      tip.textContent = text;
      tip.style.left = `${Math.min(event.clientX + 14, innerWidth - tip.offsetWidth - 8)}px`;
      tip.style.top = `${Math.min(event.clientY + 16, innerHeight - tip.offsetHeight - 8)}px`;
    }

    describe(lane, at) {
      const i = first(lane, at);
      if (i === lane.end.length) return `${lane.name}: nothing more to do`;
      const idle = lane.gap[i], [waits] = data.waits[lane.wait[i]];
      const waited = idle ? `idle before it: ${number(idle)} cycles${waits ? `, waiting for ${waits}` : ""}` : "";
      const [group, name] = data.operations[lane.op[i]];
      const here = at < lane.start[i] ? `${lane.name} is idle; next:` : lane.name;
      const tile = data.tiles[lane.tile[i]];
      const cycles = `${number(lane.end[i] - lane.start[i])} cycles, ${number(lane.start[i])} to ${number(lane.end[i])}`;
      return [here, `${data.groups[group][0]}: ${name}`, tile && `tile ${tile}`, cycles, waited].filter(Boolean).join("\n");
    }

    redraw() {
      cancelAnimationFrame(this.frame);
      this.frame = requestAnimationFrame(() => this.draw());
    }

    draw() {
      const { canvas, context, width } = this, ratio = devicePixelRatio || 1, height = canvas.clientHeight;
      canvas.width = Math.round(canvas.clientWidth * ratio);
      canvas.height = Math.round(height * ratio);
      context.scale(ratio, ratio);
      const style = getComputedStyle(canvas);
      this.ink = style.getPropertyValue("--ink");
      this.soft = style.getPropertyValue("--soft");
      this.line = style.getPropertyValue("--line");
      this.card = style.getPropertyValue("--card");
      context.font = `12px ${style.fontFamily}`;
      this.axis(height);
      const bins = new Float32Array(width * groups), idle = new Float32Array(width * data.waits.length);
      lanes.forEach((lane, index) => {
        bins.fill(0);
        idle.fill(0);
        this.lane(lane, index * (LANE + GAP), bins, idle);
      });
    }

    axis(height) {
      const { context, width } = this, span = this.to - this.from;
      const raw = span / Math.max(2, width / 150), power = 10 ** Math.floor(Math.log10(raw));
      const step = [1, 2, 5, 10].map((each) => each * power).find((each) => each >= raw);
      context.textAlign = "center";
      context.textBaseline = "middle";
      for (let tick = Math.ceil(this.from / step) * step; tick <= this.to; tick += step) {
        const x = LEFT + (tick - this.from) / span * width;
        context.fillStyle = this.line;
        context.fillRect(x, 0, 1, height - AXIS + 3);
        context.fillStyle = this.soft;
        const label = `${number(tick)} · ${time(tick)}`, half = context.measureText(label).width / 2;
        context.fillText(label, Math.min(Math.max(x, LEFT + half), LEFT + width - half), height - AXIS / 2);
      }
    }

    lane(lane, top, bins, idle) {
      const { context, width } = this, scale = width / (this.to - this.from), bar = LANE - STRIP;
      const columns = Math.floor(width);
      context.fillStyle = this.card;
      context.fillRect(LEFT, top, width, bar);
      const wide = [];
      const spread = (into, of, kind, from, to) => {  // add a stretch of pixels to the columns that it lies in
        from = Math.max(from, 0);
        to = Math.min(to, columns);
        for (let column = Math.floor(from); column < to; column++) {
          into[column * of + kind] += Math.min(to, column + 1) - Math.max(from, column);
        }
      };
      for (let i = first(lane, this.from); i < lane.end.length; i++) {
        const x = (lane.start[i] - this.from) * scale, end = (lane.end[i] - this.from) * scale;
        if (lane.wait[i]) spread(idle, data.waits.length, lane.wait[i], x - lane.gap[i] * scale, x);
        if (x > width) break;
        const group = data.operations[lane.op[i]][0];
        if (end - x < 2) spread(bins, groups, group, x, end);
        else wide.push([Math.max(x, 0), Math.min(end, width), group]);
      }
      this.columns(bins, columns, top, bar);
      for (const [from, to, group] of wide) {
        context.fillStyle = data.groups[group][1];
        context.fillRect(LEFT + from, top, Math.max(to - from - (to - from > 4 ? 0.5 : 0), 1), bar);
      }
      for (let kind = 1; kind < data.waits.length; kind++) {
        context.fillStyle = data.waits[kind][1];
        for (let column = 0; column < columns; column++) {
          const share = idle[column * data.waits.length + kind];
          if (share < 0.02) continue;
          context.globalAlpha = Math.min(1, 0.25 + share);
          context.fillRect(LEFT + column, top + bar, 1, STRIP);
        }
        context.globalAlpha = 1;
      }
      context.fillStyle = this.ink;
      context.textAlign = "right";
      context.textBaseline = "middle";
      context.fillText(lane.name, LEFT - 8, top + bar / 2, LEFT - 10);
    }

    columns(bins, columns, top, bar) {
      const { context } = this, filled = new Float32Array(columns);
      for (let group = 0; group < groups; group++) {
        context.fillStyle = data.groups[group][1];
        for (let column = 0; column < columns; column++) {
          const share = bins[column * groups + group];
          if (!share) continue;
          context.fillRect(LEFT + column, top + bar * (1 - Math.min(1, filled[column] + share)), 1, bar * share);
          filled[column] += share;
        }
      }
    }
  }

  for (const figure of document.querySelectorAll(".timeline")) new Timeline(figure).redraw();
})();
