// Draws the figures of a page, each from a script of its own: those near the screen first, then the others, one by one.
window.SFA_FIGURES = {};
addEventListener("DOMContentLoaded", () => {
  const waiting = new Set(document.querySelectorAll(".sfa-plotly"));
  let busy = false;

  function draw(place, then) {
    waiting.delete(place);
    near.unobserve(place);
    const script = document.createElement("script");
    script.src = place.dataset.figure;
    script.onload = () => {
      const figure = SFA_FIGURES[place.id];
      delete SFA_FIGURES[place.id];
      Plotly.newPlot(place, { ...figure, config: { responsive: true, displaylogo: false } }).then(then);
    };
    document.head.append(script);
  }
  function rest() {
    const next = waiting.values().next().value;
    if (busy || !next) return;
    busy = true;
    draw(next, () => { busy = false; setTimeout(rest, 20); });
  }
  const near = new IntersectionObserver((seen) => {
    seen.filter((one) => one.isIntersecting && waiting.has(one.target)).forEach((one) => draw(one.target, () => setTimeout(rest, 20)));
  }, { rootMargin: "600px" });
  waiting.forEach((place) => near.observe(place));
  setTimeout(rest, 300);
});
