// Excerpts under search results. Texts come from searchtexts.js and not by fetch, which a page opened from a folder may not do.
addEventListener("DOMContentLoaded", () => {
  const results = document.getElementById("search-results"), texts = window.SFA_TEXTS || {}, around = 110;
  const words = (new URLSearchParams(location.search).get("q") || "").toLowerCase().match(/[\p{L}\p{N}_]+/gu) || [];
  if (!results || !words.length) return;

  function mark(text) {  // a paragraph in which the words of the question are bold
    const part = document.createElement("p"), pattern = new RegExp(`(${words.map((word) => RegExp.escape ? RegExp.escape(word) : word).join("|")})`, "giu");
    part.className = "sfa-excerpt";
    text.split(pattern).forEach((piece, i) => {
      const node = i % 2 ? document.createElement("b") : document.createTextNode("");
      node.textContent = piece;
      part.append(node);
    });
    return part;
  }

  function excerpt(item) {
    const link = item.querySelector("a"), name = link && link.getAttribute("href").split(/[?#]/)[0].replace(/\.html$/, "");
    const text = texts[name];
    if (!text || item.querySelector(".sfa-excerpt")) return;
    const low = text.toLowerCase(), first = words.map((word) => low.indexOf(word)).filter((at) => at >= 0);
    if (!first.length) return;
    const at = Math.min(...first), from = at <= around ? 0 : low.indexOf(" ", at - around) + 1;
    item.append(mark(`${from ? "… " : ""}${text.slice(from, at + 2 * around)} …`));
  }

  const all = () => results.querySelectorAll("li").forEach(excerpt);
  new MutationObserver(all).observe(results, { childList: true, subtree: true });
  all();
});
