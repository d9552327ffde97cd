/* pages that answer come before modules and lists of names, first those with the words asked for in their title; the numbers below are Sphinx's own */
var Scorer = {
  score: ([page, title, , , score]) => {
    const asked = (new URLSearchParams(location.search).get('q') || '').toLowerCase().match(/\w+/g) || []
    if (/^(reference|changelog|contributing|genindex)/.test(page)) return score - 8
    if (!/^(tutorials|explanations)\//.test(page)) return score
    return score + 6 + 4 * asked.filter(o => title.toLowerCase().includes(o)).length + (page === 'explanations/faq' ? 3 : 0)
  },
  objNameMatch: 11, objPartialMatch: 6, objPrio: {0: 15, 1: 5, 2: -5}, objPrioDefault: 0,
  title: 15, partialTitle: 7, term: 5, partialTerm: 2,
}
