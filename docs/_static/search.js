/* what the search shows of a page are its sentences, without tables, code and outputs */
addEventListener('DOMContentLoaded', () => {
  if (typeof Search === 'undefined') return
  const text = Search.htmlToText
  Search.htmlToText = (html, anchor) => {
    const page = new DOMParser().parseFromString(html, 'text/html')
    for (const o of page.querySelectorAll('table, dl.py, div.cell, div.highlight')) o.remove()
    return text(page.documentElement.outerHTML, anchor)
  }
})
