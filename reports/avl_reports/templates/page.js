// Draws the plots in the page's theme. Plots come in light colours; dark ones are exchanged in the
// text of a plot.
// The plotting library lies in the page as base64 of gzip, a third of its size.
"use strict";
(() => {
  const root = document.documentElement;
  const button = document.getElementById("theme");
  const dark = new Map(JSON.parse(document.getElementById("colours").textContent));
  const literal = (text) => text.replace(/[.*+?^${}()|[\]\\]/g, "\\$&");
  const light = new RegExp([...dark.keys()].map(literal).join("|"), "g");
  const settings = {
    responsive: true,
    typesetMath: false,
    displaylogo: false,
    modeBarButtonsToRemove: ["lasso2d", "select2d", "autoScale2d"],
  };
  // Plotly's tool bar lies inside the plot's upper margin; without a pointer that hovers it would
  // never go away.
  const tools = window.matchMedia("(hover: hover) and (min-width: 561px)");
  const BAR = 34; // pixels the tool bar needs
  const preferred = window.matchMedia("(prefers-color-scheme: dark)");
  let chosen = null;
  let run = 0;

  async function unpacked(id) {
    const packed = atob(document.getElementById(id).textContent);
    const bytes = Uint8Array.from(packed, (c) => c.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
    return new Response(stream).text();
  }

  async function loadPlotly() {
    const script = document.createElement("script");
    script.textContent = await unpacked("plotly");
    document.head.appendChild(script);
  }

  function save(blob, name) {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(blob);
    link.download = name;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 60000);
  }

  async function saveFigure(name, kind) {
    const svg = new Blob([await unpacked("svg-" + name)], { type: "image/svg+xml" });
    if (kind === "svg") return save(svg, name + ".svg");
    const picture = new Image();
    picture.src = URL.createObjectURL(svg);
    await picture.decode();
    const canvas = document.createElement("canvas");
    canvas.width = 3 * picture.width;
    canvas.height = 3 * picture.height;
    canvas.getContext("2d").drawImage(picture, 0, 0, canvas.width, canvas.height);
    URL.revokeObjectURL(picture.src);
    canvas.toBlob((blob) => save(blob, name + ".png"), "image/png");
  }

  function isDark() { return chosen === null ? preferred.matches : chosen === "dark"; }

  function plotOf(element) {
    const text = document.getElementById(element.dataset.plot).textContent;
    const plot = JSON.parse(isDark() ? text.replace(light, (colour) => dark.get(colour)) : text);
    plot.layout.height = element.clientHeight;
    return plot;
  }

  async function drawAll() {
    const mine = ++run;
    root.dataset.theme = isDark() ? "dark" : "light";
    button.textContent = isDark() ? "light" : "dark";
    button.setAttribute("aria-pressed", String(isDark()));
    for (const element of document.querySelectorAll(".plot")) {
      if (mine !== run) return;
      const plot = plotOf(element);
      const picture = element.closest(".pictures, .animated") !== null;
      const bar = { displayModeBar: tools.matches && !picture ? "hover" : false };
      if (bar.displayModeBar) plot.layout.margin.t = Math.max(plot.layout.margin.t, BAR);
      await Plotly.react(element, plot.data, plot.layout, { ...settings, ...bar });
      if (plot.frames && plot.frames.length) {
        await Plotly.addFrames(element, plot.frames, plot.frames.map((_, index) => index));
      }
    }
    root.dataset.ready = "yes";
  }

  button.addEventListener("click", () => { chosen = isDark() ? "light" : "dark"; drawAll(); });
  for (const file of document.querySelectorAll("button.file")) {
    file.addEventListener("click", () => saveFigure(file.dataset.figure, file.dataset.kind));
  }
  preferred.addEventListener("change", () => { if (chosen === null) drawAll(); });
  root.dataset.theme = isDark() ? "dark" : "light";
  if (typeof DecompressionStream === "undefined") {
    document.getElementById("outdated").hidden = false;
  } else {
    loadPlotly().then(drawAll);
  }
})();
