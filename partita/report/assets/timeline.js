"use strict";
for (const figure of document.querySelectorAll(".timeline")) show(figure);

function show(figure) {
  const data = JSON.parse(figure.querySelector("script").textContent);
  const { seconds: whole, rows, tops, curve, height, sizes, colours, memory, peak } = data;
  const spans = data.spans.map(([start, length, row, colour, name, layer, critical, phase]) => ({
    start,
    length,
    end: start + length,
    row,
    colour,
    name,
    layer,
    critical,
    phase,
  }));
  const byRow = rows.map((_, r) =>
    spans.filter((s) => s.row === r).sort((a, b) => a.start - b.start),
  );
  const path = spans.filter((s) => s.critical).sort((a, b) => a.start - b.start);
  const plot = figure.querySelector(".plot"),
    tip = figure.querySelector(".tip"),
    range = figure.querySelector(".range");
  const pen = document.createElement("canvas").getContext("2d"),
    widths = new Map();
  const picture = element("svg", { width: "100%", height, "aria-hidden": "true" });
  let from = 0,
    to = whole,
    chosen = null,
    asked = false,
    pointer = null;

  function element(name, attributes, text) {
    const made = document.createElementNS("http://www.w3.org/2000/svg", name);
    for (const key in attributes) made.setAttribute(key, attributes[key]);
    if (text !== undefined) made.textContent = text;
    return made;
  }
  const add = (name, attributes, text) => picture.appendChild(element(name, attributes, text));

  // What is visible

  function view(a, b) {
    const length = Math.min(Math.max(b - a, whole / 5e4), whole);
    from = Math.min(Math.max((a + b - length) / 2, 0), whole - length);
    to = from + length;
    if (!asked) {
      asked = true;
      requestAnimationFrame(draw);
    }
  }
  const move = (part) => view(from + part * (to - from), to + part * (to - from));
  const zoom = (factor, at = (from + to) / 2) =>
    view(at - (at - from) * factor, at + (to - at) * factor);

  function firstAfter(list, time) {
    let low = 0,
      high = list.length;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (list[middle].end > time) high = middle;
      else low = middle + 1;
    }
    return low;
  }

  // Drawing

  function draw() {
    asked = false;
    const width = plot.clientWidth,
      scale = width / (to - from),
      x = (time) => (time - from) * scale;
    picture.replaceChildren();
    drawAxis(width, x);
    const shapes = colours.map(() => []),
      names = [];
    rows.forEach((_, r) => {
      add("rect", { x: 0, y: tops[r], width, height: sizes.bar, class: "lane" });
      let run = null;
      const end = () => {
        if (run) shapes[run.colour].push(box(run.a, run.b, tops[r]));
      };
      for (let i = firstAfter(byRow[r], from); i < byRow[r].length && byRow[r][i].start < to; i++) {
        const s = byRow[r][i],
          a = Math.max(x(s.start), -4),
          b = Math.min(x(s.end), width + 4);
        if (run && run.colour === s.colour && b - run.a < 1) {
          run.b = b;
          continue;
        }
        end();
        run = { a, b, colour: s.colour };
        if (b - a > 24) names.push([s, Math.max(a, 0), Math.min(b, width), r]);
      }
      end();
    });
    shapes.forEach((boxes, c) => {
      if (boxes.length) add("path", { d: boxes.join(""), class: colours[c][0] });
    });
    for (const [s, a, b, r] of names) {
      const text = fit(s.layer, b - a - 10);
      if (text)
        add(
          "text",
          { x: a + 5, y: tops[r] + sizes.bar / 2 + 4, class: "name " + colours[s.colour][0] },
          text,
        );
    }
    drawCritical(x);
    rows.forEach((name, r) => add("text", { x: 0, y: tops[r] - 7, class: "row" }, name));
    drawMemory(width, x);
    if (chosen) {
      const a = Math.max(x(chosen.start), -4),
        b = Math.min(x(chosen.end), width + 4);
      add("rect", {
        x: a - 1,
        y: tops[chosen.row] - 1,
        width: Math.max(b - a, 1) + 1,
        height: sizes.bar + 2,
        rx: 2,
        class: "chosen",
      });
    }
    if (pointer !== null)
      add("path", { d: `M${pointer} ${sizes.axis}V${height}`, class: "cursor" });
    range.textContent =
      from === 0 && to === whole
        ? `whole step, ${time(whole)}`
        : `${time(from, to - from)} – ${time(to, to - from)} of ${time(whole)}`;
  }

  function box(a, b, y) {
    const w = b - a > 3 ? b - a - 1 : Math.max(b - a, 0.2);
    return `M${a.toFixed(2)} ${y}h${w.toFixed(2)}v${sizes.bar}h-${w.toFixed(2)}z`;
  }

  function drawAxis(width, x) {
    const least = ((to - from) * 68) / width,
      ten = 10 ** Math.floor(Math.log10(least));
    const step = [1, 2, 5, 10].map((n) => n * ten).find((n) => n >= least);
    const [unit, word] = unitOf(Math.max(to, step)),
      digits = Math.max(0, Math.ceil(-Math.log10(step / unit) - 1e-9));
    for (let n = Math.ceil(from / step - 1e-9); n * step <= to; n++) {
      const at = x(n * step);
      add("path", { d: `M${at.toFixed(1)} ${sizes.axis - 4}V${height}`, class: "tick" });
      const anchor = at < 20 ? "start" : at > width - 40 ? "end" : "middle";
      add(
        "text",
        {
          x: anchor === "start" ? Math.max(at, 0) : Math.min(at, width),
          y: 12,
          "text-anchor": anchor,
        },
        n ? `${((n * step) / unit).toFixed(digits)} ${word}` : "0",
      );
    }
    if (to - from < whole)
      add("rect", {
        x: (width * from) / whole,
        y: sizes.axis - 4,
        width: Math.max((width * (to - from)) / whole, 3),
        height: 3,
        class: "overview",
      });
  }

  function drawCritical(x) {
    const marks = [],
      jumps = [];
    let jumped = -9;
    const level = (s) => tops[s.row] + sizes.bar + sizes.mark / 2;
    for (let i = firstAfter(path, from); i < path.length && path[i].start <= to; i++) {
      const s = path[i],
        a = Math.max(x(s.start), -4),
        b = Math.min(x(s.end), plot.clientWidth + 4);
      marks.push(`M${a.toFixed(2)} ${level(s)}h${Math.max(b - a, 0.4).toFixed(2)}`);
      if (!i || path[i - 1].row === s.row || x(s.start) < jumped + 3) continue;
      jumped = x(s.start);
      jumps.push(`M${jumped.toFixed(1)} ${level(path[i - 1])}V${level(s)}`);
    }
    add("path", { d: marks.join(""), class: "critical" });
    if (jumps.length) add("path", { d: jumps.join(""), class: "jump" });
  }

  function drawMemory(width, x) {
    const base = curve + sizes.memory,
      y = (bytes) => base - (sizes.memory * bytes) / Math.max(peak, 1);
    add("text", { x: 0, y: curve - 7, class: "row" }, data.memoryName);
    add("path", { d: `M0 ${curve}H${width}`, class: "top-line" });
    let before = memory.length ? memory[0][1] : 0;
    const steps = [];
    for (const [at, bytes] of memory) {
      if (at <= from) before = bytes;
      else if (at <= to) steps.push({ x: x(at), bytes });
    }
    let d = `M0 ${y(before).toFixed(1)}`;
    for (let i = 0, j = 0; i < steps.length; i = j) {
      let most = 0; // within one pixel
      for (; j < steps.length && steps[j].x < steps[i].x + 1; j++)
        most = Math.max(most, steps[j].bytes);
      d +=
        `H${steps[i].x.toFixed(1)}V${y(most).toFixed(1)}` +
        (steps[j - 1].bytes < most ? `V${y(steps[j - 1].bytes).toFixed(1)}` : "");
    }
    d += `H${width}`;
    add("path", { d: `${d}V${base}H0z`, class: "curve" });
    add("path", { d, class: "edge" });
    const most = memory.find(([, bytes]) => bytes === peak);
    if (most && most[0] >= from && most[0] <= to)
      add("circle", { cx: x(most[0]), cy: curve, r: 4, class: "peak" });
  }

  function fit(name, room) {
    const wide = (text) => {
      if (!widths.has(text)) {
        pen.font = "550 11px " + getComputedStyle(plot).fontFamily;
        widths.set(text, pen.measureText(text).width);
      }
      return widths.get(text);
    };
    const last = name.split("/").pop();
    for (const text of [name, last]) if (wide(text) <= room) return text;
    const kept = Math.floor((last.length * room) / wide(last)) - 1;
    return kept >= 3 ? last.slice(0, kept) + "…" : "";
  }

  // Numbers

  function unitOf(seconds) {
    return seconds >= 1
      ? [1, "s"]
      : seconds >= 1e-3
        ? [1e-3, "ms"]
        : seconds >= 1e-6
          ? [1e-6, "µs"]
          : [1e-9, "ns"];
  }
  function time(seconds, length = seconds) {
    // as exactly as a length beside it needs
    const [unit, word] = unitOf(seconds),
      digits = Math.max(2, 1 + Math.ceil(-Math.log10(length / unit)));
    return seconds ? `${(seconds / unit).toFixed(Math.min(digits, 9))} ${word}` : "0";
  }
  function size(bytes) {
    let n = 0;
    while (bytes >= 1024 && n < 5) {
      bytes /= 1024;
      n++;
    }
    return n ? `${bytes.toFixed(1)} ${"KMGTP"[n - 1]}iB` : `${bytes} B`;
  }

  // Asking

  function tell(x, y, title, ...lines) {
    tip.replaceChildren(
      Object.assign(document.createElement("b"), { textContent: title }),
      ...lines.flatMap((line, n) => (n ? [document.createElement("br"), line] : [line])),
    );
    tip.hidden = false;
    tip.style.left =
      Math.max(0, Math.min(x - tip.offsetWidth / 2, plot.clientWidth - tip.offsetWidth)) + "px";
    tip.style.top = y + "px";
  }

  function choose(s) {
    chosen = s;
    if (!s) {
      tip.hidden = true;
      return;
    }
    const scale = plot.clientWidth / (to - from),
      a = Math.max(s.start, from),
      b = Math.min(s.end, to);
    tell(
      ((a + b) / 2 - from) * scale,
      tops[s.row] + sizes.bar + sizes.mark + 4,
      s.name,
      `${time(s.length)}, from ${time(s.start, s.length)} to ${time(s.end, s.length)}`,
      `${colours[s.colour][1]}${s.colour < 3 ? "" : `, ${s.phase}`}${s.critical ? "; on the critical path" : ""}`,
    );
  }

  function at(event) {
    const edge = plot.getBoundingClientRect(),
      x = event.clientX - edge.left,
      y = event.clientY - edge.top;
    return { x, y, seconds: from + (x / plot.clientWidth) * (to - from) };
  }

  function spanAt({ x, y, seconds }) {
    const r = tops.findIndex((top) => y >= top - 2 && y <= top + sizes.bar + sizes.mark);
    if (r < 0) return null;
    const near = (4 * (to - from)) / plot.clientWidth,
      i = firstAfter(byRow[r], seconds);
    const close = [byRow[r][i], byRow[r][i - 1]].filter(
      (s) => s && s.start - near <= seconds && s.end + near >= seconds,
    );
    return close[0] || null;
  }

  function ask(event) {
    const place = at(event);
    pointer = place.x.toFixed(1);
    choose(spanAt(place));
    if (!chosen && place.y >= curve - 4 && place.seconds >= 0 && place.seconds <= whole) {
      let bytes = memory.length ? memory[0][1] : 0;
      for (const [begins, held] of memory) {
        if (begins > place.seconds) break;
        bytes = held;
      }
      tell(
        place.x,
        curve - sizes.label - 26,
        size(bytes),
        `at ${time(place.seconds, to - from)}${bytes === peak ? `, the peak: in ${data.peakIn || "the update"}` : ""}`,
      );
    }
    view(from, to);
  }

  function along(direction) {
    if (!path.length) return;
    const known = path.indexOf(chosen);
    const next =
      known >= 0
        ? known + direction
        : direction > 0
          ? firstAfter(path, from)
          : firstAfter(path, to) - 1;
    const s = path[Math.max(0, Math.min(next, path.length - 1))],
      middle = (s.start + s.end) / 2;
    if ((s.length / (to - from)) * plot.clientWidth < 40)
      view(middle - s.length * 4, middle + s.length * 4);
    else if (s.start < from || s.end > to)
      view(
        middle - Math.max(to - from, s.length * 1.2) / 2,
        middle + Math.max(to - from, s.length * 1.2) / 2,
      );
    pointer = null;
    choose(s);
    view(from, to);
  }

  const doing = {
    in: () => zoom(0.5),
    out: () => zoom(2),
    whole: () => view(0, whole),
    back: () => along(-1),
    on: () => along(1),
  };
  const keys = {
    "+": "in",
    "=": "in",
    "-": "out",
    Home: "whole",
    0: "whole",
    n: "on",
    p: "back",
    N: "on",
    P: "back",
  };
  const forget = () => {
    choose(null);
    pointer = null;
    view(from, to);
  };

  for (const button of figure.querySelectorAll("button")) {
    button.addEventListener("click", () => {
      if (!["back", "on"].includes(button.dataset.do)) forget();
      doing[button.dataset.do]();
    });
  }
  plot.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.key in keys) doing[keys[event.key]]();
    else if (event.key === "ArrowLeft") move(-0.2);
    else if (event.key === "ArrowRight") move(0.2);
    else if (event.key === "Escape") forget();
    else return;
    if (!"npNP".includes(event.key)) {
      choose(null);
      pointer = null;
    }
    event.preventDefault();
  });
  plot.addEventListener(
    "wheel",
    (event) => {
      if (!event.ctrlKey && document.activeElement !== plot) return;
      event.preventDefault();
      if (Math.abs(event.deltaX) > Math.abs(event.deltaY)) move(event.deltaX / plot.clientWidth);
      else
        zoom(
          Math.exp(Math.max(-1, Math.min(1, event.deltaY / (event.ctrlKey ? 60 : 240)))),
          at(event).seconds,
        );
    },
    { passive: false },
  );

  const down = new Map();
  let moved = false;
  plot.addEventListener("pointerdown", (event) => {
    if (event.button) return;
    plot.setPointerCapture(event.pointerId);
    down.set(event.pointerId, event.clientX);
    if (down.size === 1) moved = false;
  });
  plot.addEventListener("pointermove", (event) => {
    const before = down.get(event.pointerId);
    if (before === undefined) {
      if (event.pointerType === "mouse") ask(event);
      return;
    }
    if (!moved && down.size === 1 && Math.abs(event.clientX - before) < 4) return;
    if (!moved) {
      moved = true;
      plot.classList.add("moving");
      choose(null);
      pointer = null;
    }
    const left = plot.getBoundingClientRect().left,
      seconds = (x) => from + ((x - left) / plot.clientWidth) * (to - from);
    const other = [...down].find(([id]) => id !== event.pointerId);
    if (other) {
      const apart = Math.abs(before - other[1]),
        now = Math.abs(event.clientX - other[1]);
      if (apart > 8 && now > 8) zoom(apart / now, seconds(other[1]));
    } else move((before - event.clientX) / plot.clientWidth);
    down.set(event.pointerId, event.clientX);
  });
  const up = (event) => {
    if (!down.delete(event.pointerId)) return;
    plot.classList.remove("moving");
    if (!moved && event.type === "pointerup") {
      plot.focus({ preventScroll: true });
      ask(event);
    }
  };
  plot.addEventListener("pointerup", up);
  plot.addEventListener("pointercancel", up);
  plot.addEventListener("pointerleave", (event) => {
    if (event.pointerType === "mouse" && !down.size) forget();
  });

  plot.replaceChildren(picture);
  for (const hidden of figure.querySelectorAll(".controls,.hint")) hidden.hidden = false;
  new ResizeObserver(() => view(from, to)).observe(plot);
  draw();
}
