/* the navigation shows where one is */
addEventListener('DOMContentLoaded', () => {
  const list = document.querySelector('.sidebar-scroll'), here = list?.querySelector('.current-page')
  if (here) list.scrollTop += here.getBoundingClientRect().top - list.getBoundingClientRect().top - list.clientHeight / 2
})

/* a picture opens at its full size */
addEventListener('click', e => { if (e.target.matches('.cell_output img')) location = e.target.src })

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
