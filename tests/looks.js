/* What a page has that no reader should see: [kind, where or what]. `tests/test_site.py` evaluates it on every page */
(() => {
  const found = [], article = document.querySelector('article'), say = (kind, o) => found.push(`${kind}: ${o.trim().slice(0, 80)}`)
  document.head.insertAdjacentHTML('beforeend', '<style>* { transition: none !important }</style>')
  const once = (f, known = new Map()) => o => known.has(o) ? known.get(o) : known.set(o, f(o)).get(o)
  const style = once(o => getComputedStyle(o)), shown = once(o => o.getClientRects().length && style(o).visibility !== 'hidden')
  const html = document.documentElement
  if (html.scrollWidth > html.clientWidth) say('wider than the screen', `${html.scrollWidth}`)
  const right = article.getBoundingClientRect().right + 14 // headings reach a little beyond
  const scrolls = once(o => o !== article && (style(o).overflowX !== 'visible' || scrolls(o.parentElement)))
  for (const o of article.querySelectorAll('*:not(mjx-container *)'))
    if (o.getBoundingClientRect().width && o.getBoundingClientRect().right > right && !scrolls(o.parentElement))
      say('wider than the page', o.textContent)
  for (const o of article.querySelectorAll('section'))
    if (![...o.children].some(k => !/^(H\d|SPAN)$/.test(k.tagName))) say('nothing below a heading', o.id)
  for (const o of article.querySelectorAll('a[href]:not(.headerlink, .viewcode-link, :has(img))'))
    if (o.textContent.trim() && shown(o) && !style(o).textDecorationLine.includes('underline'))
      say('a link that does not look like one', o.textContent)
  const numbers = s => s.match(/[\d.]+/g).map(Number), over = (a, b) => [0, 1, 2].map(i => a[i]*(a[3] ?? 1) + b[i]*(1 - (a[3] ?? 1)))
  const light = c => c.map(v => v/255)
    .map(v => v <= .03928 ? v/12.92 : ((v + .055)/1.055)**2.4).reduce((s, v, i) => s + v*[.2126, .7152, .0722][i], 0)
  const back = once(o => o ? over(numbers(style(o).backgroundColor), back(o.parentElement)) : [255, 255, 255])
  const pale = once(o => {
    const b = back(o), ls = [light(over(numbers(style(o).color), b)), light(b)].sort((x, y) => y - x)
    return (ls[0] + .05)/(ls[1] + .05) < (parseFloat(style(o).fontSize) >= 24 ? 3 : 4.5)
  })
  const texts = document.createTreeWalker(article, NodeFilter.SHOW_TEXT), range = document.createRange()
  for (let t = texts.nextNode(); t; t = texts.nextNode()) {
    const o = t.parentElement
    if (!t.data.trim() || o.closest('script, style, mjx-container, .headerlink') || !shown(o)) continue
    if (pale(o)) say('too little contrast', t.data)
    if (!o.closest('pre, code, .sig') && /\*\*|`|\]\(|^#+ |\|-|:::|\$\$|\{[a-z]+[:}]|&\w+;/.test(t.data)) say('markdown', t.data)
    if (o.closest('table code, .sig-name, .sig-prename')) for (const m of t.data.matchAll(/\w{2,}/g)) {
      range.setStart(t, m.index)
      range.setEnd(t, m.index + m[0].length)
      if (new Set([...range.getClientRects()].map(r => Math.round(r.top))).size > 1) say('a line ends within a name', m[0])
    }
  }
  return [...new Set(found)]
})()
